"""The order of samples: permutations, blending, hashed choices."""

from collections import Counter
from fractions import Fraction

import pytest

from deepv3.data.order import GROUP, Blend, chance, draw, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097])
def test_an_epoch_visits_every_row_once(size):
    for epoch in range(3):
        assert sorted(permuted(i, size, 7, epoch) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(permuted(i, 500, seed, epoch) for i in range(500)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(500)) not in orders


def test_a_permutation_leaves_no_trend():
    size = 10_000
    places = [permuted(i, size, 3) for i in range(size)]
    near = sum(abs(a - b) < 100 for a, b in zip(places, places[1:]))
    assert near / size < 0.03  # 2 % of independent pairs lie that close
    early = sum(place < size // 2 for place in places[: size // 2])
    assert abs(early - size / 4) < 4 * (size / 16) ** 0.5


def test_permuting_takes_no_memory_in_the_size():
    assert 0 <= permuted(123_456_789_012, 10**15, 1) < 10**15


@pytest.mark.parametrize("weights", [[1.0], [3, 1], [0.3, 0.7], [0.1, 0.2, 0.3, 0.4], [1] * 7, [5, 0.01, 0.4, 1e-3]])
def test_blending_gives_each_source_its_exact_share_and_each_place_once(weights):
    blend, n = Blend(weights, seed=5), GROUP * 300
    places = [blend.locate(i) for i in range(n)]
    count = Counter(source for source, _ in places)
    for source, weight in enumerate(weights):
        drawn = sorted(index for s, index in places if s == source)
        assert drawn == list(range(len(drawn)))
        assert abs(count[source] - n * weight / sum(weights)) <= 0.5 * len(weights).bit_length()


def test_shares_are_exact_after_one_period():
    blend, period = Blend([0.3, 0.7], seed=1), 10 * GROUP
    for start in (0, 10**9 // period * period):
        count = Counter(blend.locate(n)[0] for n in range(start, start + period))
        assert Fraction(count[0], period) == Fraction(3, 10)


def test_no_data_rank_is_left_with_one_source():
    blend = Blend([1, 1], seed=0)
    for rank in range(4):
        share = Counter(blend.locate(n)[0] for n in range(rank, 64 * 200, 4))[0] / 3200
        assert 0.45 < share < 0.55


def test_the_order_of_samples_never_changes_between_versions():
    """A resumed run must meet the samples that it would have met."""
    assert draw(1, 2, 3) == 7702586659592502839
    assert [permuted(i, 10, 0, 0) for i in range(10)] == [3, 6, 2, 9, 8, 4, 1, 7, 0, 5]
    assert [Blend([3, 1], 0).locate(n) for n in range(6)] == [(1, 3), (0, 11), (0, 12), (0, 13), (1, 4), (0, 14)]


def test_hashed_choices_have_their_rate():
    rate = sum(chance(0.1, 1, 2, n << 40) for n in range(50_000)) / 50_000
    assert abs(rate - 0.1) < 0.006
    assert not any(chance(0.0, n) for n in range(100))
    assert all(chance(1.0, n) for n in range(100))
