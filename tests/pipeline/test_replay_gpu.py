"""CUDA graphs of micro-batches on a device: the steps that they replace, and what they spare the host."""

import time

import layouts
import pytest
import ranks
import shared_gpu
import torch
from layouts import Case, Outcome, Trainer
from test_replay import STEPS, same

from deepv3.pipeline.replay import Replay

pytestmark = pytest.mark.gpu


def prepared(case: Case, replayed: bool) -> Trainer:
    trainer = Trainer(case)
    assert isinstance(trainer.executor.replay, Replay), "a GPU holds the whole model, so graphs are the default"
    if not replayed:
        trainer.executor.replay = None
    return trainer


def train(case: Case, replayed: bool) -> Outcome:
    """Steps with a validation in between, and another loss scale from the fourth on."""
    trainer = prepared(case, replayed)
    for step in range(1, STEPS + 1):
        if step == 4:
            trainer.case = trainer.case._replace(batch=2)
            trainer.share = range(trainer.grid.dp_rank, 2, trainer.grid.dp_size)
        trainer.step(step)
        if step in (1, 2):
            trainer.validate()
    return trainer.outcome(trainer.validate())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("mtp, recompute", [(0, "selective"), (1, "full")])
def test_graphs_train_as_the_launches_do(precision, mtp, recompute):
    case = Case(mtp=mtp, recompute=recompute, precision=precision, batch=3, wide=True)
    plain, found = (layouts.together(ranks.run(1, train, case, replayed)) for replayed in (False, True))
    assert same(found, plain)


def test_graphs_of_two_data_ranks_train_as_the_launches_do():
    """Gradients are reduced outside of the graphs; ranks share a GPU where there is one only."""
    case = Case(mtp=1, precision="bf16", batch=4, dp=2, wide=True)
    plain, found = (layouts.together(shared_gpu.run(2, train, case, replayed)) for replayed in (False, True))
    assert same(found, plain)


def enqueue(case: Case, replayed: bool) -> float:
    """Seconds until the host has enqueued a step's micro-batches, the median of ten."""
    trainer = prepared(case, replayed)
    for step in (1, 2, 3):
        trainer.step(step)
    found = []
    batches = list(trainer.batches(4))
    for _ in range(10):
        trainer.engine.begin_step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.executor.run(iter(batches), len(batches), 1 / (case.batch * case.seq_len), 0.3, trainer.engine.reduce)
        found.append(time.perf_counter() - began)
        trainer.engine.finish_step(1e-3)
    return sorted(found)[5]


def test_the_host_is_free_at_once():
    case = Case(mtp=1, precision="fp8", batch=4, wide=True)
    launches, graphs = (ranks.run(1, enqueue, case, replayed)[0] for replayed in (False, True))
    print(f"four micro-batches enqueued in {launches * 1e3:.1f} ms, from graphs in {graphs * 1e3:.1f} ms")
    assert graphs < launches / 5
