"""Kernels of the exchange between ranks: a whole round of several ranks in one process, beside the references."""

import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch

import deepv3.kernels as api
from deepv3.kernels import exchange as kernels
from deepv3.kernels.reference import exchange as references
from deepv3.kernels.reference.routing import routing_tables as tables

SECONDS = 5.0  # of the reference's patience; the kernels count looks here


class Ranks:
    """P ranks' areas and flags. Rank r has rows for everybody, by items or as they lie in an area."""

    def __init__(self, peers: int, capacity: int, words: int) -> None:
        self.peers = peers
        self.areas = [torch.zeros(peers, capacity, words, dtype=torch.int32) for _ in range(peers)]
        self.flags = [torch.zeros(peers, dtype=torch.int64) for _ in range(peers)]
        self.failed = [torch.zeros(peers, dtype=torch.int32) for _ in range(peers)]

    def round(self, module, number, counts, rows, items, patience) -> list[torch.Tensor]:
        for me, sent in enumerate(counts):
            module.push(rows[me], self.areas, sent, me, None if items is None else items[me])
            module.signal(sent, self.flags, me, number)
        return [self.wait(module, me, number, patience) for me in range(self.peers)]

    def wait(self, module, me, number, patience) -> torch.Tensor:
        return module.wait(self.flags[me], number, self.areas[me], self.failed[me], patience)


def draw(peers, capacity, words, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, capacity + 1, (peers, peers), generator=generator, dtype=torch.int32)
    counts[0, -1], counts[-1, 0] = 0, capacity
    rows = torch.randint(-(2**31), 2**31, (peers, peers * capacity, words), generator=generator).int()
    items = torch.stack([torch.randperm(peers * capacity, generator=generator) for _ in range(peers)]).int()
    return counts, rows, items


@pytest.mark.parametrize(("peers", "capacity", "words"), [(2, 5, 16), (3, 9, 24), (4, 7, 1040)])
@pytest.mark.parametrize("by_items", [True, False])
def test_a_round_moves_what_the_reference_moves(peers, capacity, words, by_items):
    counts, rows, items = draw(peers, capacity, words, seed=peers)
    ours, theirs = Ranks(peers, capacity, words), Ranks(peers, capacity, words)
    chosen = items if by_items else None
    came = ours.round(kernels, 7, counts, rows, chosen, 10)
    assert all(torch.equal(a, b) for a, b in zip(came, theirs.round(references, 7, counts, rows, chosen, SECONDS)))
    for me in range(peers):
        assert torch.equal(came[me], counts[:, me]) and not ours.failed[me].any()
        assert torch.equal(ours.areas[me], theirs.areas[me]) and torch.equal(ours.flags[me], theirs.flags[me])
        taken, expected = kernels.take(ours.areas[me], came[me]), references.take(theirs.areas[me], came[me])
        there = (torch.arange(capacity) < came[me][:, None]).flatten()
        assert torch.equal(taken[there], expected[there])


@pytest.mark.parametrize("module", [kernels, references], ids=["kernel", "reference"])
def test_a_source_that_never_comes_is_named_and_leaves_nan(module):
    ranks = Ranks(3, 4, 16)
    counts = torch.full((3,), 2, dtype=torch.int32)
    for me in (0, 2):
        module.push(torch.ones(12, 16, dtype=torch.int32), ranks.areas, counts, me)
        module.signal(counts, ranks.flags, me, 5)
    module.signal(counts, ranks.flags, 1, 4)  # of the exchange before
    came = ranks.wait(module, 0, 5, 3 if module is kernels else 0.01)
    assert came.tolist() == [2, 0, 2] and ranks.failed[0].tolist() == [0, 1, 0]
    area = ranks.areas[0]
    assert area[1, 0].view(torch.bfloat16).isnan().all() and area[1, 0].view(torch.float32).isnan().all()
    assert not area[1, 1:].any() and torch.equal(area[0, :2], torch.ones(2, 16, dtype=torch.int32))


def test_no_rows_at_all_still_signal():
    ranks, counts = Ranks(2, 3, 16), torch.zeros(2, 2, dtype=torch.int32)
    came = ranks.round(kernels, 1, counts, torch.zeros(2, 6, 16, dtype=torch.int32), None, 10)
    assert [c.tolist() for c in came] == [[0, 0], [0, 0]]
    assert kernels.take(torch.zeros(2, 0, 16, dtype=torch.int32), counts[0]).shape == (0, 16)


def test_places_are_those_of_the_worked_example():
    ranks, slots = torch.tensor([[0, -1], [0, 1]]).int(), torch.tensor([[0, -1], [1, 2]]).int()
    for module in (kernels, references):
        assert module.places(ranks, slots, torch.tensor([2, 1]).int(), 4).tolist() == [[0, -1], [1, 4]]


@pytest.mark.parametrize(("peers", "tokens", "top_k"), [(2, 0, 3), (3, 500, 4), (8, 77, 2)])
def test_places_equal_the_reference(peers, tokens, top_k):
    ranks = torch.rand(tokens, peers).topk(min(top_k, peers), dim=1).indices.sort(dim=1).values.int()
    ranks[::3, -1] = -1
    slots, _, _, counts = tables(ranks, peers)
    assert torch.equal(*(module.places(ranks, slots, counts, tokens) for module in (kernels, references)))


@pytest.mark.parametrize(("peers", "capacity", "top_k", "at"), [(2, 5, 4, 0), (3, 70, 3, 2), (2, 0, 8, 0)])
def test_gates_and_choices_are_unpacked_as_the_reference_does(peers, capacity, top_k, at):
    record = torch.randint(0, 12, (peers, capacity, 16)).int()
    counts = torch.randint(0, capacity + 1, (peers,)).int()
    ours, theirs = (module.unpack(record, counts, at, torch.float32, top_k, 4, 4) for module in (kernels, references))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(ours, theirs))


def _rounds_with_kernels():
    """Rounds of a dispatcher beside all-to-all's, with the Triton kernels in place of the references."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "model"))
    from test_symmetric import exchanges

    def wait(flags, number, area, failed, patience):
        end = time.monotonic() + patience
        while not bool((flags >> 32 == number).all()) and time.monotonic() < end:
            time.sleep(1e-4)  # the interpreter's patience is a number of looks
        return kernels.wait(flags, number, area, failed, 2)

    ours = {name: getattr(kernels, name) for name in ("push", "signal", "take", "places", "unpack")}
    with mock.patch.multiple(api, wait=wait, **ours):
        return exchanges(5, 8, width=64)


def test_two_ranks_with_interpreted_kernels_exchange_as_all_to_all_does():
    assert ranks.run(2, _rounds_with_kernels) == [True, True]
