"""The whole of a run behind launch/pretrain.py: train, tell where things lie, do what train.finish asks for."""

from collections.abc import Callable

import torch

from deepv3.config.schema import Config
from deepv3.dist import shutdown
from deepv3.train import memory
from deepv3.train.loop import Run


def pretrain(cfg: Config, started: float, finish: Callable) -> None:
    """Train `cfg`, then call finish(cfg, model, step, say) on rank 0, which does what train.finish asks for.

    started: wall clock, seconds, of the process's first line, for the start-to-first-step figure.
    """
    try:
        run = Run(cfg, started)
    except torch.OutOfMemoryError as error:
        raise memory.explain(error, cfg, {}) from error
    try:
        if run.fraction() < 1:
            run.announce()
            run.train()
        else:
            run.line.say(f"{run.dir} is finished at step {run.at.step}; nothing to train")
    except torch.OutOfMemoryError as error:
        raise memory.explain(error, cfg, memory.held(run)) from error
    finally:
        pictures = run.close()
    chief, model, step, say = run.chief, run.model, run.at.step, run.line.say
    shutdown()
    if not chief:
        return
    run.engine.release()
    finish(cfg, model, step, say)
    say(f"run folder   {cfg.run_dir}")
    for picture in pictures:
        say(f"picture      {picture}")
    if "export" in cfg.train.finish:
        say(f"export       {cfg.run_dir}/export")
