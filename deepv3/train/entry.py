"""The whole of a run behind launch/pretrain.py: train, tell where things lie, do what train.finish asks for.

However it ends, the other ranks hear why: a collective that fails because a peer died becomes PeerLost, naming it.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from deepv3.config.schema import Config
from deepv3.dist import shutdown
from deepv3.errors import DeepV3Error, PeerLost, Stopped
from deepv3.train import memory
from deepv3.train.faults import is_lost_connection
from deepv3.train.loop import Run


def pretrain(cfg: Config, started: float, finish: Callable) -> None:
    """Train `cfg`, then call finish(cfg, model, step, say) on rank 0, which does what train.finish asks for.

    started: wall clock, seconds, of the process's first line, for the start-to-first-step figure.
    """
    try:
        run = Run(cfg, started)
    except Exception as error:
        if is_lost_connection(error):
            raise PeerLost("a rank died while the ranks were joining; start again") from error
        raise
    try:
        pictures = _train(run)
    except BaseException as error:
        lost = _as_peer_lost(run, error)
        left = "done" if isinstance(error, Stopped) else type(lost or error).__name__
        run.guards.watch.close(left if lost or isinstance(error, Stopped) else f"{left}: {error}")
        if lost is not None:
            raise lost from error
        raise
    run.guards.watch.close()
    chief, model, step, say = run.chief, run.model, run.at.step, run.line.say
    shutdown()
    if not chief:
        return
    run.engine.release()
    del run.executor  # CUDA graphs hold a micro-batch's activations
    finish(cfg, model, step, say)
    say(f"run folder   {cfg.run_dir}")
    for picture in pictures:
        say(f"{'report' if picture.suffix == '.html' else 'picture':12s} {picture}")
    if "export" in cfg.train.finish:
        say(f"export       {cfg.run_dir}/export")


def _train(run: Run) -> list[Path]:
    """Build and train; the pictures' paths."""
    try:
        run.build()
    except torch.OutOfMemoryError as error:
        raise memory.explain(error, run.cfg, {}) from error
    try:
        if run.fraction() < 1:
            run.announce()
            run.train()
        elif run.chief:
            run.line.say(f"{run.dir} is finished at step {run.at.step}; nothing to train")
    except torch.OutOfMemoryError as error:
        raise memory.explain(error, run.cfg, memory.held(run)) from error
    finally:
        pictures = run.close()
    return pictures


def _as_peer_lost(run: Run, error: BaseException) -> PeerLost | None:
    """The error as what it means for this rank, where it is another one's end; takes seconds, to see who is silent."""
    if run.grid.world_size == 1 or isinstance(error, DeepV3Error) or not is_lost_connection(error):
        return None
    return PeerLost(f"{run.guards.watch.blame()}; start again to go on from the newest checkpoint")
