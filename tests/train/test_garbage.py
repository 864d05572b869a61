"""The collector runs when it is told to, and is afterwards as it was."""

import gc
import weakref

import pytest

from deepv3.train import garbage


class Ring:
    """In a cycle with itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector_is_left_as_it_was():
    yield
    assert gc.isenabled() and gc.get_freeze_count() == 0


def dropped() -> weakref.ref:
    return weakref.ref(Ring())


def test_cycles_go_every_few_steps_and_in_pauses_only():
    with garbage.steady() as collector:
        ring = dropped()
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        collector.step(garbage.EVERY + 1)
        assert ring() is not None
        collector.step(2 * garbage.EVERY)
        assert ring() is None
        old = dropped()
        gc.collect(1)
        second = dropped()
        collector.pause()
        assert old() is None and second() is None


def test_an_error_leaves_the_collector_on():
    with pytest.raises(ValueError, match="inside"), garbage.steady():
        raise ValueError("inside")
    assert gc.isenabled()
