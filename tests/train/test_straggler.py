"""Slow ranks are named once a window, and only they."""

from deepv3.train.straggler import Stragglers


def _speak(ratio, seconds, steps, window=10):
    stragglers = Stragglers(ratio, window)
    return [words for _ in range(steps) if (words := stragglers.add(seconds))]


def test_a_slow_rank_is_named_once_a_window_with_its_figures():
    (first, second) = _speak(1.25, [1.0, 1.0, 1.5, 1.1], 25)
    assert first == second
    assert first == "slow: rank 2 (1.500 s, 1.50 x); the median rank computes 1.000 s a step over the last 10 steps"


def test_ranks_that_are_alike_are_not_named_nor_is_one_alone():
    assert _speak(1.25, [1.0, 1.2, 1.1], 30) == [] and _speak(1.25, [3.0], 30) == []


def test_a_ratio_of_zero_names_nobody():
    assert _speak(0.0, [1.0, 9.0, 1.0], 30) == []


def test_of_many_slow_ranks_the_worst_five_are_named():
    (words,) = _speak(1.25, [1.0] * 9 + [2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 10)
    assert words.startswith("slow: rank 14 (7.000 s, 7.00 x), rank 13") and "and 1 more" in words


def test_one_slow_step_is_not_a_slow_rank():
    stragglers = Stragglers(1.25, 10)
    spoken = [stragglers.add([1.0, 1.0, 2.0 if n == 3 else 1.0]) for n in range(10)]
    assert spoken == [None] * 10
