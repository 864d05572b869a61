"""Build a run, resume it, train it to its end, and leave everything on disk.

A run in order: refuse what cannot work; tokenizer and data; model, engine, state of the newest checkpoint; then
steps, with validation, checkpoints and pictures in between. On CUDA the host reads a step's figures one step late, so
the device never waits for it.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from deepv3 import arithmetic
from deepv3.checkpoint import store
from deepv3.checkpoint.agree import agree
from deepv3.checkpoint.saver import Saver
from deepv3.config.compose import to_yaml
from deepv3.config.schema import Config
from deepv3.config.validate import validate
from deepv3.data.loader import build_data
from deepv3.dist import Grid, init_distributed
from deepv3.errors import CheckpointError, Stopped
from deepv3.optim.ema import WeightAverage
from deepv3.optim.engine import build_engine
from deepv3.pipeline.build import Placement, build_pipeline
from deepv3.pipeline.replay import records
from deepv3.train import garbage, memory, metrics
from deepv3.train.events import EventLog, note_end
from deepv3.train.faults import Votes
from deepv3.train.guards import Guards, Verdict
from deepv3.train.profiler import Window
from deepv3.train.progress import LiveLine
from deepv3.train.report import Reporter
from deepv3.train.saves import Saves
from deepv3.train.step import Plan, Progress, StepRecord, train_step
from deepv3.train.trace import Pauses


class Run:
    """One training run on this rank: its parts, and the loop over them. `build` comes before all else."""

    def __init__(self, cfg: Config, started: float):
        self.cfg = cfg
        self.started = started
        self.dir = Path(cfg.run_dir)
        self.grid: Grid = init_distributed(cfg)
        self.chief = self.grid.rank == 0
        self.device = self.grid.device
        validate(cfg, self.grid.world_size)
        records(cfg, self.device)  # refuses before data are read
        self.placement = Placement.of(cfg, self.grid)
        self.at = Progress()
        self.guards = Guards(cfg, self.grid)
        self.val_loss: float | None = None
        self.line = LiveLine(cfg.logging.progress and self.chief)
        self.pauses = Pauses()
        self.window = Window(cfg.logging, self.dir, self.grid)

    def build(self) -> None:
        """Make or find everything a step needs, in the state that train.resume names."""
        cfg = self.cfg
        self._claim_folder()
        self.data = build_data(cfg, self.grid)
        self.model, self.executor = build_pipeline(cfg, self.grid, self.placement)
        self.engine = build_engine(
            self.model,
            cfg,
            self.grid,
            self.placement.chunk_of,
            lambda name: self.placement.owner_of(name, self.grid.mirrored),
        )
        self.ema = WeightAverage(self.engine, cfg.optim.ema_decay) if cfg.optim.ema_decay > 0 else None
        self.resumed_from = self._resume()
        self.first_step = self.at.step + 1
        self.recorder = metrics.Recorder(cfg, self.at.step) if self.chief else None
        self.reporter = Reporter(self.dir) if self.chief else None
        self.held = memory.held(self)
        self.peak_flops = metrics.peak_tflops(cfg, self.device) * 1e12 * self.grid.world_size
        self.flops = {
            causal: arithmetic.flops_per_token(cfg.model, cfg.data.seq_len, causal=causal, mtp=True)
            for causal in (True, False)
        }

    # -- before the first step -------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """Refuse a folder that belongs to another run; write config.yaml."""
        store.check_run_folder(self.dir, self.cfg)

        def write() -> None:
            self.dir.mkdir(parents=True, exist_ok=True)
            beside = self.dir / ".config.yaml"
            beside.write_text(to_yaml(self.cfg), encoding="utf-8")
            beside.replace(self.dir / "config.yaml")

        agree(self.grid, f"write {self.dir}/config.yaml", lambda: write() if self.chief else None)

    def _resume(self) -> Path | None:
        """Load the checkpoint that train.resume names; None where the run starts fresh.

        A checkpoint of this run_dir brings its place in the run; one of another run brings its state only, and tokens
        are counted from 0 again (the long-context phases start so).
        """
        path = store.choose(self.cfg, self.grid)
        if path is None:
            return None
        client = store.load(path, self.engine, self.model, self.ema, self.grid)
        if path.resolve().is_relative_to(self.dir.resolve()):
            try:
                self.at = Progress(**client["progress"])
                self.data.train.load_state_dict(client["data"])
                self.guards.spikes.load_state_dict(client.get("spikes", {}))
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path}: the loop's own state does not follow the format: {error!r}") from None
        return path

    def announce(self) -> None:
        """Say what is about to be trained, on what, and where it starts."""
        if not self.chief:
            return
        count, model, at = arithmetic.parameters(self.cfg.model), self.cfg.model, self.at
        self.line.say(
            f"model    {count.total / 1e6:,.1f} M parameters, {count.active / 1e6:,.1f} M active; "
            f"{model.num_hidden_layers} layers, {model.n_routed_experts} experts top-{model.num_experts_per_tok}"
        )
        for line in (*self.placement.describe(self.cfg, self.grid), *self.data.summary):
            self.line.say(line)
        start = "fresh start" if self.resumed_from is None else f"goes on from {self.resumed_from}"
        where = f"{self.grid.world_size} process(es) on {self.device}, {start}"
        self.line.say(f"run      {self.dir}, {where}, step {at.step + 1}")
        EventLog(self.dir).add("start" if self.resumed_from is None else "restart", at.step, where)

    # -- the loop --------------------------------------------------------------------------------------------------

    def fraction(self) -> float:
        """Share of the run that is done, by steps or tokens, whichever ends it first."""
        train = self.cfg.train
        shares = []
        if train.steps is not None:
            shares.append(self.at.step / train.steps if train.steps else 1.0)
        if train.tokens is not None:
            shares.append(self.at.tokens / train.tokens if train.tokens else 1.0)
        return max(shares)

    def train(self) -> None:
        """Steps until the end; Stopped if a signal asked for it (state saved), NumericsError after too many skips."""
        with garbage.steady() as collector:
            self._train(collector)

    def _train(self, collector: garbage.Collector) -> None:
        cuda, every = self.device.type == "cuda", self.cfg.checkpoint.every
        pending: StepRecord | None = None
        saver = Saver(self.dir, self.engine, self.model, self.ema, self.grid, self.cfg)
        self.saves = Saves(saver, self.cfg, self.guards.events)
        self.guards.begin(self.saves, self.at.step, self._client())
        if self.at.step == 0 and self.fraction() < 1:
            self._validate()
        while self.fraction() < 1:
            self.guards.watch.step(self.at.step + 1)
            plan = Plan.of(self.cfg, self.at)
            batches = self.data.train.micro_batches(self.at.samples, plan.sequences, self.cfg.train.micro_batch_size)
            self.window.before(plan.step)
            record = train_step(self, plan, batches, self.guards.votes())
            self.window.after(plan.step)
            collector.step(plan.step)
            self.at = plan.after
            last, due, validate = self.fraction() >= 1, self._due(every), self._due(self.cfg.train.eval_every)
            verdicts = [self._report(pending)] if pending is not None else []
            pending = record
            if not cuda or any(any(verdict) for verdict in verdicts) or due or validate or last:
                verdicts.append(self._report(pending))
                pending = None
            if any(self._rewind(verdict) for verdict in verdicts):
                continue
            wanted = any(verdict.stop for verdict in verdicts)
            if validate or due or last:
                collector.pause()
            if validate or last:
                with self.pauses.span("validation"):
                    self._validate()
            if last and self.chief and self.val_loss is not None:  # the live line still shows the one before
                self.line.say(f"validation loss {self.val_loss:.3f} after step {self.at.step}")
            if every is not None and (due or wanted or last):
                with self.pauses.span("checkpoint"):
                    self._save(wait=wanted or last)
            if wanted and not last:
                raise Stopped(f"stopped by a signal after step {self.at.step}; state saved, start again to go on")

    def _rewind(self, verdict: Verdict) -> bool:
        """Undo the steps since the last copy of the state, where a spike asks for it; their data is passed over."""
        if verdict.rewind is None:
            return False
        spiked, self.at = self.at, Progress(**self.guards.rewind(self.at.step, verdict.rewind)["progress"])
        self.guards.tell(
            "rewind",
            spiked.step,
            f"{verdict.rewind}: back to step {self.at.step}; samples {self.at.samples} to {spiked.samples - 1} are "
            "passed over for good",
        )
        self.at.samples = spiked.samples
        if self.recorder is not None:
            self.recorder.cut(self.at.step)
        return True

    def _due(self, every: int | None) -> bool:
        return every is not None and every > 0 and self.at.step % every == 0

    def _report(self, record: StepRecord) -> Verdict:
        """Turn a finished step into its row and a verdict."""
        out, norm, skipped, votes, bias_low, bias_high = record.read()
        plan, seconds = record.plan, record.clock.seconds()
        if self.recorder is not None and self.reporter is not None:
            row = self._row(record, out, norm, skipped, bias_low, bias_high, seconds)
            self.recorder.step(row)
            if plan.step == 1 or plan.step % self.cfg.logging.plot_every == 0:
                self.recorder.load(plan.step, out.counts)
                self.reporter.refresh()
            self.line.update(row, self.fraction(), self.val_loss)
        spent = record.times()
        busy = spent.get("time_compute", 0.0) + spent.get("time_data", 0.0)
        return self.guards.judge(plan.step, float(out.loss_main), norm, skipped, Votes.unpack(votes), busy)

    def _row(self, record, out, norm, skipped, bias_low, bias_high, seconds) -> dict:
        plan = record.plan
        rate = plan.tokens / seconds
        row = {"step": plan.step, "tokens": plan.after.tokens, **metrics.loss_figures(out, plan.mtp_weight)}
        row |= {"lr": plan.lr, "bias_update_speed": plan.bias_speed, "mtp_loss_weight": plan.mtp_weight}
        row |= {"sequences": plan.sequences, "grad_norm": norm, "skipped": skipped}
        row |= {"tokens_per_second": rate, "tokens_per_second_per_gpu": rate / self.grid.world_size}
        for name, causal in (("mfu", True), ("mfu_full_attention", False)):
            row[name] = self.flops[causal] * rate / self.peak_flops if self.peak_flops else 0.0
        row |= {"memory_gib": _peak_memory_gib(self.device), "step_seconds": seconds}
        row |= record.times() | self.pauses.take()
        row |= metrics.memory_parts(self.held, row["memory_gib"])
        row |= metrics.router_figures(out, plan.tokens)
        row |= {"dispatch_rows": record.load.rows, "dispatch_received": record.load.received}
        row |= {"router_bias_min": bias_low, "router_bias_max": bias_high}
        if plan.step == self.first_step:
            row["startup_seconds"] = time.time() - self.started
        return row

    def _validate(self) -> None:
        """Mean loss over train.eval_sequences held-out sequences, the same ones each time."""
        if not self.cfg.train.eval_every or self.data.validation is None:
            return
        count = self.cfg.train.eval_sequences
        size = self.cfg.train.micro_batch_size
        batches = self.data.validation.micro_batches(0, count, size)
        share = count // (size * self.grid.dp_size)
        out = self.executor.evaluate(batches, share, loss_scale=1.0 / (count * self.cfg.data.seq_len))
        figures = torch.stack([out.loss_main, out.loss_mtp])
        self.grid.sum_over_world(figures)
        main, mtp = figures.tolist()
        self.val_loss = main
        if self.recorder is not None:
            row = {"step": self.at.step, "tokens": self.at.tokens, "val_loss": main, "val_loss_mtp": mtp}
            self.recorder.validate(row)

    def _client(self) -> dict:
        """The loop's own state, JSON; all ranks call it together."""
        spikes = self.guards.spikes.state_dict()
        return {"progress": vars(self.at) | {}, "data": self.data.train.state_dict(), "spikes": spikes}

    def _save(self, wait: bool) -> None:
        (self.saves.last if wait else self.saves.periodic)(self.at.step, self._client())
        self.guards.watch.step(self.at.step)

    def close(self) -> list[Path]:
        """Stop the background work; returns the paths of the report and the pictures (rank 0)."""
        self.window.close(self.at.step)
        self.data.close()
        self.line.close()
        if self.recorder is None or self.reporter is None:
            return []
        note_end(self.dir, self.at.step, sys.exception())
        drawn = self.reporter.close()
        self.recorder.close(drawn[0] if drawn else None)
        return drawn


def _peak_memory_gib(device: torch.device) -> float:
    """Largest memory in use so far: allocated on the GPU, resident on the CPU, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
