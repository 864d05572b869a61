"""The order of a pair, and what the timeline makes of it."""

from contextlib import nullcontext

import pytest
import torch

from deepv3.pipeline.lanes import Lanes
from deepv3.pipeline.overlap import ORDER, Walk, interleave
from deepv3.pipeline.stage import ATTN, COMBINE, DISPATCH, MLP, OTHER
from deepv3.pipeline.timeline import COMMUNICATION, COMPUTE, WAITING, Timeline, common, length, union

FORTH, BACK = [ATTN, DISPATCH, MLP, COMBINE], [COMBINE, MLP, DISPATCH, ATTN]


def walk(kinds, side, log):
    def pieces():
        for kind in kinds:
            yield kind
            log.append(f"{kind}({side})")

    return Walk(pieces(), lambda kind: nullcontext())


def run(forward, backward):
    log: list[str] = []
    interleave(walk(forward, "F", log), walk(backward, "B", log), lambda: log.append("W"))
    return log


def test_a_steady_round_moves_one_micro_batch_while_the_other_computes():
    log = run(FORTH * 3, BACK * 3)
    start = log.index("attn(F)")
    middle = [entry for entry in log[start + 1 :] if entry != "W"]
    assert middle[:8] == [
        "mlp(B)", "dispatch(F)", "dispatch(B)", "mlp(F)", "combine(F)", "attn(B)", "combine(B)", "attn(F)",
    ]  # fmt: skip
    assert next(entry for entry in log if entry != "W") == "combine(B)"


def test_weight_gradients_follow_the_exchange_that_waits_for_their_input_gradients():
    log = run(FORTH * 2, BACK * 2)
    for done, then in (("mlp(B)", "dispatch(B)"), ("attn(B)", "combine(B)")):
        at = log.index(done)
        after = log[at + 1 : log.index("W", at)]
        assert then in after


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        ([OTHER, ATTN, MLP, *FORTH], [*BACK, *BACK, OTHER]),
        ([*FORTH, OTHER, OTHER, *FORTH, OTHER], [OTHER, *BACK]),
        ([ATTN, MLP], [OTHER] * 5),
        (FORTH * 4, BACK),
        ([], BACK),
    ],
)
def test_every_piece_runs_once_in_its_own_order_however_the_two_differ(forward, backward):
    log = run(forward, backward)
    assert [e[:-3] for e in log if e.endswith("(F)")] == forward
    assert [e[:-3] for e in log if e.endswith("(B)")] == backward
    assert log[-1] == "W"


def test_the_order_names_every_piece_of_both_sides_once():
    assert sorted(kind for side, kind in ORDER if side == "F") == sorted(FORTH)
    assert sorted(kind for side, kind in ORDER if side == "B") == sorted(BACK)


def test_hidden_communication_is_what_it_shares_with_computation():
    compute, comm = union([(0, 2), (1, 3), (5, 6)]), union([(2, 4), (5.5, 7)])
    assert compute == [(0, 3), (5, 6)] and length(compute) == 4
    assert common(compute, comm) == common(comm, compute) == 1.5


def test_a_timeline_tells_hidden_from_exposed_and_waiting():
    timeline = Timeline(torch.device("cpu"))
    zero = timeline._origin
    for kind, start, end in ((COMPUTE, 0, 4), (COMMUNICATION, 3, 5), (COMMUNICATION, 3.5, 6), (WAITING, 7, 9)):
        timeline.add(kind, zero + start, zero + end)
    assert timeline.fields() == pytest.approx({"time_comm_hidden": 1, "time_comm_exposed": 2, "time_bubble": 2})


def test_on_the_cpu_all_communication_is_exposed():
    lanes, log = Lanes(torch.device("cpu")), []

    def pieces():
        for kind in FORTH:
            yield kind
            log.append(kind)

    lanes.walk(pieces()).finish()
    fields = lanes.take_timeline().fields()
    assert log == FORTH and fields["time_comm_hidden"] == 0 < fields["time_comm_exposed"]
    assert lanes.take_timeline().fields()["time_comm_exposed"] == 0
