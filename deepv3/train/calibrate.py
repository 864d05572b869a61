"""Measures this device for the planner: rows of a calibration file (deepv3/planner/measured.py has the format).

Real training steps of a configuration's own widths, batch and precision run under a `Meter`, which says where their
time goes; a few layers of it are enough, since no rate depends on depth. The fastest steps give a row of each kind:
products and attention by FLOPs, what is left of attention, experts and head by the bytes that fused kernels would need,
norm and update by parameters. The planner's sum over these rows is the step they were measured in. Beside it only a
copy is measured alone. Not measured: exchanges between devices and overlapped pairs, which keep the base's values.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from deepv3.config.schema import Config
from deepv3.config.validate import validate
from deepv3.data.loader import Batch
from deepv3.dist import init_distributed
from deepv3.errors import ConfigError
from deepv3.optim.engine import build_engine
from deepv3.pipeline.build import Placement, build_pipeline
from deepv3.planner.calibration import Calibration
from deepv3.planner.hardware import DEVICES
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory, misfit
from deepv3.planner.work import Workload
from deepv3.train import garbage
from deepv3.train.meter import ATTENTION, ATTENTION_BACKWARD, CODES, Mark, Measured, Meter

LAYERS = 4
MICRO_BATCHES, WARMUP, SETTLE, STEPS = 2, 16, 4, 12
FASTEST = 0.25  # of the steps give rows
COPY = 1 << 28  # bytes
COPIES = 10
LAUNCHINGS = 9  # times that the host is watched enqueuing; the median counts
LEAD = 8192  # width of the products that the device is given before a step


def measured_part(cfg: Config) -> Config:
    """What is run of `cfg`: at most four layers, one of them dense if it has any, one device, no MTP, even routing.

    Raises ConfigError for what cannot be trained.
    """
    model, train = cfg.model, cfg.train
    dense = min(model.first_k_dense_replace, 1)
    part = replace(
        cfg,
        model=replace(
            model,
            num_hidden_layers=min(model.num_hidden_layers, LAYERS),
            first_k_dense_replace=dense,
            num_nextn_predict_layers=0,
            force_balance=True,
        ),
        train=replace(
            train,
            global_batch_size=MICRO_BATCHES * train.micro_batch_size,
            batch_ramp=None,
            recompute="selective" if train.recompute == "full" else train.recompute,
            cuda_graph=False,  # whose inside nothing can time
        ),
        parallel=replace(cfg.parallel, pp_size=1, ep_size=1, schedule="1f1b", layout=""),
    )
    validate(part, 1, training=False)  # its tokens are random
    return part


def require_room(part: Config, device_name: str) -> None:
    """Raise ConfigError where the measured part does not fit in the device's memory."""
    cluster = replace(part.cluster, device=device_name, devices=1)
    layout = Layout.of(replace(part, cluster=cluster))
    reason = misfit(Memory(layout, Calibration()).ranks(), layout)
    if reason:
        raise ConfigError(f"{LAYERS} layers of this model do not fit: {reason}; or fewer model.n_routed_experts")


class Bench:
    """A few layers of a configuration, training on this device. cfg: of `measured_part`."""

    def __init__(self, cfg: Config) -> None:
        grid = init_distributed(cfg)
        if grid.world_size > 1:
            raise ConfigError(f"{grid.world_size} ranks: a calibration runs on one device; start one process")
        self.cfg, self.device = cfg, grid.device
        placement = Placement.of(cfg, grid)
        model, self.executor = build_pipeline(cfg, grid, placement)
        self.engine = build_engine(model, cfg, grid, placement.chunk_of, lambda name: placement.owner_of(name, False))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.meter = Meter(cfg.model, cfg.train.micro_batch_size * cfg.data.seq_len, cfg.data.seq_len, self.device)
        shape = (cfg.train.micro_batch_size, cfg.data.seq_len + 1)
        tokens = (torch.randint(cfg.model.vocab_size, shape, device=self.device) for _ in range(MICRO_BATCHES))
        self.batches = [Batch(drawn, None) for drawn in tokens]
        self._host = 0.0  # seconds that a step takes to enqueue

    def _lead(self) -> None:
        """Products that keep the device busy while the host enqueues the step behind them.

        Marks cost the host more than the device, which would wait for it otherwise; a device that idled instead would
        start the step at higher clocks than training has.
        """
        if self.device.type != "cuda" or not self._host:
            return
        factor = torch.randn(LEAD, LEAD, device=self.device).to(torch.bfloat16)
        product = torch.matmul(factor, factor)
        start = Mark(self.device)
        torch.matmul(factor, factor, out=product)
        stop = Mark(self.device)
        torch.cuda.synchronize(self.device)
        for _ in range(round(self._host / start.until(stop))):
            torch.matmul(factor, factor, out=product)

    def step(self) -> Measured:
        """One optimizer step, taken apart."""
        train, meter = self.cfg.train, self.meter
        self._lead()
        meter.begin()
        self.engine.begin_step()
        tokens = MICRO_BATCHES * train.micro_batch_size * self.cfg.data.seq_len
        self.executor.run(self.batches, MICRO_BATCHES, 1.0 / tokens, 0.0, on_chunk_done=self.engine.reduce)
        meter.compute_done()
        self.engine.finish_step(self.cfg.optim.lr)
        return meter.end()

    def steps(self) -> list[Measured]:
        """Those that count, after kernels were compiled and chosen and clocks have settled."""
        with self.meter.installed():
            self._host = min(self.step().host for _ in range(WARMUP))
            return [self.step() for _ in range(SETTLE + STEPS)][SETTLE:]

    def launching(self) -> float:
        """Seconds until the host has enqueued one micro-batch, forward and backward, without marks: of all layers,
        the embedding and the head.

        A step's second, since the first makes the weights' FP8 codes for all of them. Alone and to an idle device: the
        driver's queue holds about a thousand kernels, and then the host waits.
        """
        found = []
        for _ in range(LAUNCHINGS):
            self.engine.begin_step()
            for _ in range(2):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                start = time.perf_counter()
                self.executor.run(self.batches[:1], 1, 1e-4, 0.0, on_chunk_done=lambda chunk: None)
            found.append(time.perf_counter() - start)
            self.engine.finish_step(self.cfg.optim.lr)
        return statistics.median(found)

    def rows(self, steps: list[Measured]) -> Iterator[dict[str, Any]]:
        """All rows of these steps, a copy, and the host's."""
        yield self.copy()
        if self.device.type == "cuda":  # elsewhere the host is the device
            layers = self.cfg.model.num_hidden_layers
            yield {"kind": "launching", "layers": layers, "seconds": self.launching()}
        fewest = self._fewest_bytes()
        for step in steps:
            yield from _products(step)
            left = step.rest
            head = left.get("head", 0.0) + left.get("other", 0.0)
            pieces = {"attention": left["attention"], "experts": left["experts"], "head": head}
            for piece, seconds in pieces.items():
                yield {"kind": "elementwise", "piece": piece, "bytes": fewest[piece], "seconds": seconds}
            yield {"kind": "update", "parameters": self.parameters, "seconds": step.update}

    def copy(self) -> dict[str, Any]:
        """Reading and writing, alone: a copy waits for memory at any clock."""
        source = torch.zeros(COPY, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        start = Mark(self.device)
        for _ in range(COPIES):
            target.copy_(source)
        stop = Mark(self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {"kind": "copy", "bytes": 2 * COPY * COPIES, "seconds": start.until(stop)}

    def _fewest_bytes(self) -> dict[str, float]:
        """Of all micro-batches of a step, by piece."""
        cfg, m = self.cfg, self.cfg.model
        device = next(iter(DEVICES.values()))  # bytes do not depend on it
        tokens = cfg.train.micro_batch_size * cfg.data.seq_len
        work = Workload(
            m, device, Calibration(), cfg.precision.name, cfg.train.recompute, cfg.data.seq_len, tokens, ep=1
        )
        layers = [work.fewest_bytes(index >= m.first_k_dense_replace) for index in range(m.num_hidden_layers)]
        found = {piece: MICRO_BATCHES * sum(layer[piece] for layer in layers) for piece in ("attention", "experts")}
        return found | {"head": MICRO_BATCHES * work.head_bytes}


def fastest(steps: list[Measured]) -> list[Measured]:
    """The share of the steps that gives rows: where the host fell behind, a step says nothing of the device."""
    return sorted(steps, key=lambda step: step.step)[: math.ceil(FASTEST * len(steps))]


def _products(step: Measured) -> Iterator[dict[str, Any]]:
    """Rows of a step's products; passes that share a constant are one row, so that its rate is the one of their sum."""
    together: dict[tuple[str, ...], list[float]] = {}
    for kind, numbers in step.products.items():
        if kind[1:2] == ("dense",) and kind[2] == "input" or kind[:2] == ("bf16", "grouped"):
            kind = (*kind[:2], "forward")
        together[kind] = [a + b for a, b in zip(together.get(kind, [0.0] * 3), numbers)]
    for kind, (work, seconds, summed) in together.items():
        if kind == CODES:
            yield {"kind": "codes", "parameters": work, "seconds": seconds}
        elif kind in (ATTENTION, ATTENTION_BACKWARD):
            yield {"kind": "attention", "pass": kind[1], "flops": work, "seconds": seconds}
        else:
            row = {"kind": "gemm", "format": kind[0], "shape": kind[1], "pass": kind[2], "flops": work}
            yield row | {"seconds": seconds} | ({"summed": summed} if summed else {})


def document(cfg: Config, device_name: str, command: str) -> dict[str, Any]:
    """The calibration file of this CUDA device, named as in the planner's table of devices.

    Raises ConfigError where there is no such device, or not enough of its memory.
    """
    if not torch.cuda.is_available():
        raise ConfigError("what=calibration measures a CUDA device, and there is none here")
    import triton

    part = measured_part(cfg)
    require_room(part, device_name)
    bench = Bench(part)
    with garbage.steady():  # as in training
        steps = bench.steps()
        rows = list(bench.rows(fastest(steps)))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    return {
        "format": 1,
        "name": f"{torch.cuda.get_device_name(bench.device)}, {bench.cfg.precision.name}",
        "device": device_name,
        "command": command,
        "versions": versions,
        "step_seconds": [step.step for step in steps],
        "host_seconds": [step.host for step in steps],
        "rows": rows,
    }
