"""What one rank brings to a checkpoint: its slices of masters, moments and average, buffers, random generators."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepv3.checkpoint import manifest as manifests
from deepv3.dist import Grid
from deepv3.optim.ema import WeightAverage
from deepv3.optim.engine import Engine


class State(NamedTuple):
    """tensors: (key in the shard, contiguous tensor), views where the state is live. part: what the manifest says of
    them, JSON: slices, buffers, shapes, client. counters: the engine's. averaged: whether `ema` is among the kinds."""

    tensors: list[tuple[str, Tensor]]
    part: dict[str, Any]
    counters: dict[str, int]
    averaged: bool


def collect(
    engine: Engine, model: nn.Module, average: WeightAverage | None, grid: Grid, client: dict[str, Any]
) -> State:
    """This rank's share; every element and every buffer of the run is some rank's, once. Waits for the device."""
    if average is not None:
        average.wait()
    tensors: list[tuple[str, Tensor]] = []
    slices, shapes = [], {}
    for fragment in engine.fragments():
        kinds = {kind: getattr(fragment, kind) for kind in manifests.STATE}
        if average is not None:
            kinds["ema"] = average.view(fragment)
        tensors += [(manifests.key(kind, fragment.name, fragment.lo), tensor) for kind, tensor in kinds.items()]
        slices.append((fragment.name, fragment.lo, fragment.hi))
        shapes[fragment.name] = list(fragment.shape)
    buffers = persistent_buffers(model) if grid.first_copy else {}
    tensors += [(f"buffer/{name}", buffer) for name, buffer in buffers.items()] + generators()
    part = {"slices": slices, "buffers": list(buffers), "shapes": shapes, "client": client}
    return State(tensors, part, engine.counters(), average is not None)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are state (router biases), not derived (rope tables)."""
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def generators() -> list[tuple[str, Tensor]]:
    """State of this process's random generators, as copies."""
    states = [("rng/cpu", torch.get_rng_state())]
    return states + ([("rng/cuda", torch.cuda.get_rng_state())] if torch.cuda.is_available() else [])


def set_generators(states: dict[str, Tensor | None]) -> None:
    """The inverse of `generators`; what is None or has no device here is left alone."""
    cpu, cuda = states.get("rng/cpu"), states.get("rng/cuda")
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
