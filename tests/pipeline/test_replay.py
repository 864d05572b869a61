"""Micro-batches started from recordings are those run call by call, bit for bit.

A recording of a CUDA graph repeats what the device did, at the same addresses with the same numbers, and nothing that
Python did. `Tape` does so on the CPU: it notes every operation below autograd and runs them again into the same
tensors. So whatever a recording would freeze by mistake (a loss scale, FP8 codes, a first write of a gradient, a table
that was freed) is frozen here too. On devices: test_replay_gpu.py.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import layouts
import pytest
import ranks
import torch
from layouts import Case, Outcome, Trainer
from test_parity_fp8 import config as narrow8
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import deepv3.kernels as kernels
from deepv3.config.schema import Config, SourceConfig
from deepv3.config.validate import validate
from deepv3.errors import ConfigError
from deepv3.model.dispatch import Load
from deepv3.pipeline import replay
from deepv3.pipeline.figures import StepOut
from deepv3.pipeline.replay import Replay
from deepv3.train import loop

STEPS = 5
config = layouts.config


def tensors(value) -> list[torch.Tensor]:
    """All tensors of nested arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [found for part in value for found in tensors(part)] if isinstance(value, (tuple, list)) else []


class Tape(TorchDispatchMode):
    """Operations in their order, each with its arguments and the tensors that its results went to. One of our kernels
    is one operation: its reference may look at values, as the kernel does on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            assert result == 1.0, "the host waits for the device"  # on the CPU the head looks at its own factor
        elif func.overloadpacket is not torch.ops.aten.empty:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def kernel(self, func):
        """A kernel that is noted."""

        def noted(*args, **kwargs):
            with _disable_current_modes():
                result = func(*args, **kwargs)
            self.calls.append((func, args, kwargs, result))
            return result

        return noted

    @contextmanager
    def recording(self):
        with ExitStack() as stack:
            for name in kernels.__all__:
                if callable(func := getattr(kernels, name)) and not isinstance(func, type):
                    stack.enter_context(mock.patch.object(kernels, name, self.kernel(func)))
            yield stack.enter_context(self)

    def start(self) -> None:
        """Run everything again, results into the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, kept in self.calls:
                owned = {t.data_ptr() for t in tensors(args) + tensors(tuple(kwargs.values()))}
                for old, new in zip(tensors(kept), tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() not in owned:  # not a view of an argument, nor the argument written
                        old.copy_(new)


def recorder(model, work, pool):
    """Records without effect, as a device does: gradients are as before, losses rubbish."""
    before = [parameter.main_grad.clone() for parameter in model.parameters()]
    tape = Tape()
    with tape.recording():
        figures = work()
    for parameter, gradient in zip(model.parameters(), before):
        parameter.main_grad.copy_(gradient)
    for name in StepOut.__dataclass_fields__:
        getattr(figures, name).fill_(torch.nan)
    return figures, tape.start


class Masked(Trainer):
    """Every micro-batch has two documents, divided where its first token says."""

    def batches(self, step):
        for batch in super().batches(step):
            starts = torch.arange(batch.tokens.shape[1]) > 1 + batch.tokens[:, :1] % 5
            yield batch._replace(documents=starts.int())


def train(case: Case, replayed: bool, mistake=None, kind=Trainer) -> tuple[Outcome, list[Load], int]:
    """Some steps with a validation in between, and what each step's dispatches needed; the number of recordings."""
    made = [0]

    def count(*arguments):
        made[0] += 1
        return recorder(*arguments)

    with mock.patch.object(layouts, "config", partial(narrow8, balanced=False) if case.precision == "fp8" else config):
        trainer = kind(case)
    if replayed:
        trainer.executor.replay = Replay(trainer.model, trainer.grid.device, partial(count, trainer.model))
    loads = []
    with mistake() if mistake is not None else nullcontext():
        for step in range(1, STEPS + 1):
            if step == 4:  # other sequences a step, as in a batch ramp: another loss scale
                trainer.case = trainer.case._replace(batch=2)
                trainer.share = range(trainer.grid.dp_rank, 2, trainer.grid.dp_size)
            trainer.step(step)
            loads.append(trainer.model.dispatcher.take_load())
            if step in (1, 2):  # before and after the recordings are made
                trainer.validate()
        return trainer.outcome(trainer.validate()), loads, made[0]


def once(case: Case, replayed: bool, mistake=None, kind=Trainer) -> tuple[Outcome, list[Load], int]:
    """All ranks' outcome; the first one's loads and number of recordings."""
    outcomes, loads, made = zip(*ranks.run(case.world, train, case, replayed, mistake, kind))
    return layouts.together(list(outcomes)), loads[0], made[0]


@cache
def plainly(case: Case) -> tuple[Outcome, list[Load]]:
    """The same without recordings."""
    return once(case, False)[:2]


CASES = [
    Case(mtp=1, precision="fp32", batch=3), Case(mtp=0, precision="fp32", batch=3, recompute="full"),
    Case(mtp=1, precision="fp8", batch=3), Case(mtp=0, precision="fp8", batch=1, recompute="none"),
    Case(mtp=0, precision="fp32", batch=6, dp=2),
]  # fmt: skip


def same(found: Outcome, plain: Outcome) -> bool:
    """Bit for bit."""
    assert found.state.keys() == plain.state.keys()
    alike = [torch.equal(found.state[name][kind], plain.state[name][kind]) for name in plain.state for kind in
             plain.state[name]]  # fmt: skip
    alike += [torch.equal(found.biases[row], plain.biases[row]) for row in plain.biases]
    figures = (found.losses, found.norms, found.validation) == (plain.losses, plain.norms, plain.validation)
    return all(alike) and figures


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_micro_batches_are_the_plain_ones(case):
    plain, plain_loads = plainly(case)
    found, loads, made = once(case, True)
    assert same(found, plain) and loads == plain_loads
    # For steps 2 and 3, and for step 5, one for the first micro-batch and one for the others; steps 1 and 4 bring new
    # numbers and run call by call.
    assert made == min(2, case.batch // case.dp) + 2 // case.dp


def test_documents_are_new_in_every_micro_batch():
    """A mask is made inside the recording, from where each one's documents were brought."""
    case = Case(mtp=1, precision="fp32", batch=3)
    (plain, *_), (found, *_) = (once(case, replayed, kind=Masked) for replayed in (False, True))
    assert same(found, plain) and not same(found, plainly(case)[0])


def _codes_of_another_step():
    """A recording reads codes that a validation made before it."""
    return mock.patch.object(Replay, "_outdate_codes", lambda self: None)


def _gradients_not_marked():
    """Started gradients do not count as written: the flat buffer is zeroed."""
    return mock.patch.object(replay, "_ready", lambda parameter: True)


def _each_the_first():
    """Every micro-batch stores its gradients over the one before."""
    real = Replay.run
    return mock.patch.object(Replay, "run", lambda self, number, *rest: real(self, 0, *rest))


def _scale_frozen():
    """Recordings outlive the numbers that are in them."""
    return mock.patch.object(Replay, "ready", lambda self, key: self._key is not None or bool(setattr(self, "_key", 1)))


def _tokens_frozen():
    """The first micro-batch is trained again and again."""
    real = Replay.run
    seen = []

    def run(self, number, batch, work):
        seen.append(batch)
        return real(self, number, seen[0], work)

    return mock.patch.object(Replay, "run", run)


@pytest.mark.parametrize(
    "mistake", [_codes_of_another_step, _gradients_not_marked, _each_the_first, _scale_frozen, _tokens_frozen]
)
def test_each_mistake_is_seen(mistake):
    case = CASES[2]
    assert not same(once(case, True, mistake)[0], plainly(case)[0])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_unasked_a_gpu_with_the_whole_model_records_and_nothing_else(device, ep_size):
    cfg = Config()
    cfg.parallel.ep_size = ep_size
    assert cfg.train.cuda_graph is None
    assert replay.records(cfg, torch.device(device)) == (device == "cuda" and ep_size == 1)
    cfg.train.cuda_graph = False
    assert not replay.records(cfg, torch.device(device))


def test_a_cut_up_model_and_a_device_that_cannot_record_are_refused(monkeypatch):
    cfg = Config()
    cfg.train.cuda_graph, cfg.train.steps, cfg.train.global_batch_size, cfg.train.eval_every = True, 1, 4, 0
    validate(cfg, 1, training=False)
    for name, value in (("pp_size", 2), ("ep_size", 2), ("schedule", "dualpipev")):
        cut = replace(cfg, parallel=replace(cfg.parallel, **{name: value}))
        with pytest.raises(ConfigError, match=f"train.cuda_graph = true.*parallel.{name} = {value}"):
            validate(cut, 2, training=False)
    cfg.data.sources = [SourceConfig(path="unread")]
    here = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    monkeypatch.setattr(loop, "init_distributed", lambda cfg: here)
    with pytest.raises(ConfigError, match="train.cuda_graph = true wants a CUDA device, and this is cpu"):
        loop.Run(cfg, 0.0)
