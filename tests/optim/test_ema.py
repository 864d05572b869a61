"""The asynchronous weight average against the formula applied in step."""

import threading

import pytest
import ranks
import torch
from standin import config, start

from deepv3 import dist
from deepv3.optim.ema import WeightAverage

DECAY = 0.9


def _average(steps, precision):
    """Largest difference between the average and its formula, on this rank."""
    run = start(config(precision))
    average = WeightAverage(run.engine, DECAY)
    expected = [master.clone() for master in run.engine.masters()]
    for number in range(1, steps + 1):
        run.step(number)
        average.update()
        for wanted, master in zip(expected, run.engine.masters()):
            wanted.lerp_(master, 1 - DECAY)
    average.wait()
    for f in run.engine.fragments():
        wanted = expected[f.group].narrow(0, f.start, f.hi - f.lo)
        assert torch.equal(average.view(f), wanted), f.name
        assert not torch.equal(wanted, f.master) or f.name.startswith("unused"), f.name
    return True


@pytest.mark.parametrize(("world", "precision"), [(1, "fp32"), (2, "bf16")])
def test_the_average_is_exactly_the_synchronous_one(world, precision):
    assert all(ranks.run(world, _average, 4, precision))


@pytest.fixture
def run():
    yield start(config())
    dist.shutdown()


def test_training_goes_on_while_the_average_is_folded_in(run, monkeypatch):
    average = WeightAverage(run.engine, DECAY)
    go = threading.Event()
    fold = average._fold_in
    monkeypatch.setattr(average, "_fold_in", lambda copied: (go.wait(30), fold(copied)))
    run.step(1)
    after_first = [master.clone() for master in run.engine.masters()]
    average.update()
    run.step(2)  # changes the masters while the fold still waits
    go.set()
    average.wait()
    f = run.engine.fragments()[0]
    first = after_first[f.group].narrow(0, f.start, f.hi - f.lo)
    assert not torch.equal(first, f.master)
    initial = start(config()).engine.fragments()[0].master
    assert torch.equal(average.view(f), initial.lerp(first, 1 - DECAY))


def test_what_the_thread_raises_reaches_the_caller(run, monkeypatch):
    average = WeightAverage(run.engine, DECAY)

    def broken(copied):
        raise MemoryError("host")

    monkeypatch.setattr(average, "_fold_in", broken)
    average.update()
    with pytest.raises(MemoryError, match="host"):
        average.wait()


def test_reset_starts_again_from_the_masters(run):
    average = WeightAverage(run.engine, DECAY)
    run.step(1)
    average.update()
    average.reset()
    assert all(torch.equal(average.view(f), f.master) for f in run.engine.fragments())
