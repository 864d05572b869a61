"""What the lowering pass adds, and where it puts it."""

from dataclasses import replace

import pytest

from deepv3.pipeline.actions import Pair, Transfer, parts
from deepv3.pipeline.check import check
from deepv3.pipeline.lower import lower
from deepv3.pipeline.schedule import SCHEDULES, forward_only, make_schedule

NAMES = tuple(SCHEDULES)


def transfers(schedule, rank, kind):
    return [step for step in schedule.actions[rank] if isinstance(step, Transfer) and step.kind == kind]


@pytest.mark.parametrize("name", NAMES)
def test_lowering_leaves_the_compute_as_it_was(name):
    schedule = make_schedule(name, 4, 9)
    lowered = lower(schedule)
    for rank in range(4):
        assert list(lowered.compute(rank)) == list(schedule.actions[rank])


@pytest.mark.parametrize("name", NAMES)
def test_every_boundary_between_ranks_is_crossed_once_each_way(name):
    schedule = make_schedule(name, 4, 8)
    lowered = lower(schedule)
    crossings = sum(a != b for route in schedule.routes for a, b in zip(route, route[1:])) * 8 // len(schedule.routes)
    for kind in ("SEND", "RECV", "FREE"):
        for channel in ("act", "grad"):
            found = sum(t.channel == channel for rank in range(4) for t in transfers(lowered, rank, kind))
            assert found == crossings


def test_bottom_of_the_v_hands_over_in_place():
    lowered = lower(make_schedule("dualpipev", 4, 8))
    bottom = {(t.channel, t.stage) for kind in ("SEND", "RECV") for t in transfers(lowered, 3, kind)}
    assert bottom == {("act", 3), ("act", 4), ("grad", 3), ("grad", 4)}
    assert not any(t.stage == 3 and t.channel == "act" for t in transfers(lowered, 3, "SEND"))
    assert not any(t.stage == 4 and t.channel == "act" for t in transfers(lowered, 3, "RECV"))
    assert not any(t.stage == 4 and t.channel == "grad" for t in transfers(lowered, 3, "SEND"))


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipev"])
def test_one_rank_sends_nothing(name):
    lowered = lower(make_schedule(name, 1, 4))
    assert not any(isinstance(step, Transfer) for step in lowered.actions[0])


def test_send_follows_its_step_and_receive_precedes_its_use_by_one_step():
    lowered = lower(make_schedule("1f1b", 3, 6))
    for rank in range(3):
        steps = lowered.actions[rank]
        compute = [i for i, step in enumerate(steps) if not isinstance(step, Transfer)]
        for i, step in enumerate(steps):
            if not isinstance(step, Transfer) or step.kind == "FREE":
                continue
            kind = "F" if step.channel == "act" else "B"
            at = next(j for j in compute if steps[j][:3] == (kind, step.stage, step.micro_batch))
            if step.kind == "SEND":
                assert at < i and not any(at < j < i for j in compute)
            else:
                assert i < at and sum(i < j < at for j in compute) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_free_leaves_a_message_the_time_of_a_step(name):
    lowered = lower(make_schedule(name, 4, 8))
    for rank in range(4):
        steps = lowered.actions[rank]
        for i, step in enumerate(steps):
            if isinstance(step, Transfer) and step.kind == "FREE":
                sent = steps.index(step._replace(kind="SEND"))
                between = sum(not isinstance(other, Transfer) for other in steps[sent:i])
                after = any(not isinstance(other, Transfer) for other in steps[i:])
                assert between >= 1 or not after


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_results_of_a_pair_may_leave_in_either_order(name):
    """Activation and gradient of a pair travel on different links: posting them the other way round changes nothing."""
    lowered = lower(make_schedule(name, 4, 12))
    turned, swaps = [], 0
    for rank in range(4):
        steps = list(lowered.actions[rank])
        for i in range(1, len(steps) - 1):
            a, b = steps[i : i + 2]
            sends = all(isinstance(step, Transfer) and step.kind == "SEND" for step in (a, b))
            if isinstance(steps[i - 1], Pair) and sends and a.channel != b.channel:
                steps[i], steps[i + 1] = b, a
                swaps += 1
        turned.append(tuple(steps))
    assert swaps > 10
    assert check(replace(lowered, actions=tuple(turned))).makespan == check(lowered).makespan


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_both_ends_of_a_link_post_in_one_order(name):
    lowered = lower(make_schedule(name, 4, 12))
    for channel in ("act", "grad"):
        for low in range(3):
            ends = []
            for rank, peer in ((low, low + 1), (low + 1, low)):
                posts = [
                    step
                    for step in lowered.actions[rank]
                    if isinstance(step, Transfer)
                    and step.kind != "FREE"
                    and (step.channel, step.peer) == (channel, peer)
                ]
                ends.append([(t.micro_batch, (t.kind == "SEND") == (rank == low)) for t in posts])
            assert ends[0] == ends[1]
            assert len({upwards for _, upwards in ends[0]}) == 2, "both senses share the link"


def test_forward_only_sends_activations_only():
    lowered = lower(forward_only(make_schedule("dualpipe", 4, 6)))
    sent = [step for steps in lowered.actions for step in steps if isinstance(step, Transfer)]
    assert sent and {step.channel for step in sent} == {"act"}
    assert {a.kind for rank in range(4) for step in lowered.compute(rank) for a in parts(step)} == {"F"}
