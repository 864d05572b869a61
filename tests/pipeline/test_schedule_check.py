"""What the checker measures on sound lists, and that it finds every fault put into one."""

import doctest
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import Action, Pair, Transfer, parts
from deepv3.pipeline.check import check
from deepv3.pipeline.dryrun import Costs
from deepv3.pipeline.lower import lower
from deepv3.pipeline.schedule import SCHEDULES, forward_only, make_schedule
from deepv3.pipeline.text import parse_schedule

NAMES = tuple(SCHEDULES)


def ranks_of(name: str, most: int = 16) -> range:
    return range(2, most + 1, 2) if name == "dualpipe" else range(1, most + 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_any_ranks_and_any_count_pass_the_checker_at_any_costs(name, seed):
    draw = random.Random(f"{name} {seed}")
    for ranks in ranks_of(name):
        for count in (draw.randint(1, ranks), draw.randint(1, 2 * ranks), draw.randint(2 * ranks, 3 * ranks)):
            times = [draw.uniform(0.2, 3.0) for _ in range(3)]
            costs = Costs(*times, pair=sum(times) * draw.uniform(0.6, 1.1), message=draw.choice([0.0, 0.05, 2.0]))
            lowered = lower(make_schedule(name, ranks, count), ahead=draw.randint(0, 3))
            report = check(lowered, costs)
            chunks = sum(len(route) for route in lowered.routes) // len(lowered.routes) * count
            assert sum(len(parts(step)) for spans in report.spans for step, *_ in spans) == 2 * chunks + sum(
                report.counts(rank)["W"] for rank in range(ranks)
            )


@pytest.mark.parametrize("name", NAMES)
def test_every_count_from_1_to_beyond_2_pp_passes(name):
    for count in range(1, 12):
        report = check(make_schedule(name, 4, count))
        assert min(report.bubble) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_forward_only_lists_pass_and_keep_nothing(name):
    for ranks in (2, 4):
        for count in (1, 3, 8):
            report = check(forward_only(make_schedule(name, ranks, count)))
            assert all(peak.live == peak.kept == 0 for peak in report.peaks)


@pytest.mark.parametrize("costs", [Costs(), Costs(1.0, 1.5, 0.7, 3.2), Costs(49.0, 75.0, 32.0)])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_bubbles_of_1f1b_and_zb1p_are_the_formulas(ranks, costs):
    f, b, w = costs.forward, costs.input_grad + costs.weight_grad, costs.weight_grad
    for name, bubble in (("1f1b", (ranks - 1) * (f + b)), ("zb1p", (ranks - 1) * (f + b - 2 * w))):
        report = check(make_schedule(name, ranks, 3 * ranks), costs)
        assert report.bubble == pytest.approx([bubble] * ranks), name


@pytest.mark.parametrize("ranks", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("more", [0, 2, 10])
def test_dualpipe_bubble_and_peak_are_the_formulas(ranks, more):
    bubble = (ranks // 2 - 1) * (3 + 2 - 3)
    count = 2 * ranks + more
    for schedule in (make_schedule("dualpipe", ranks, count), make_schedule("dualpipev", ranks // 2, count)):
        report = check(schedule)
        assert report.bubble == pytest.approx([bubble] * len(report.bubble))
        assert {(peak.live, peak.kept) for peak in report.peaks} == {(ranks + 1, ranks + 1)}


def test_pp16_m120_gives_the_specified_bubbles_and_peaks():
    expected = {("1f1b", 16): (45, 16), ("zb1p", 16): (15, 16), ("dualpipe", 16): (14, 17), ("dualpipev", 8): (14, 17)}
    for (name, ranks), (bubble, peak) in expected.items():
        report = check(make_schedule(name, ranks, 120))
        assert max(report.bubble) == min(report.bubble) == bubble
        assert max(p.live for p in report.peaks) == max(p.kept for p in report.peaks) == peak
    assert check(make_schedule("1f1b", 16, 120)).bubble_share == pytest.approx(45 / 405)
    assert check(make_schedule("dualpipe", 16, 120)).bubble_share == pytest.approx(14 / 374)


def test_overlap_that_saves_time_gives_the_specified_bubble():
    report = check(make_schedule("dualpipe", 16, 120), Costs(pair=2.5))
    unoverlapped = 120 * 3.0
    assert report.makespan == 319.0  # 360 of work less half a unit for each of 103 pairs of the middle ranks, plus 10.5
    assert max(report.bubble) == 10.5 and 10.5 / unoverlapped == pytest.approx(0.0292, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "ranks", "count", "share", "peak"),
    [
        ("dualpipev", 8, 20, 0.104, 17),
        ("dualpipe", 8, 20, 0.091, 9),
        ("1f1b", 8, 20, 0.259, 8),
        ("dualpipev", 16, 40, 0.111, 33),
        ("dualpipe", 16, 40, 0.104, 17),
        ("1f1b", 16, 40, 0.273, 16),
    ],
)
def test_simulated_table_is_reproduced(name, ranks, count, share, peak):
    report = check(make_schedule(name, ranks, count))
    assert max(report.bubble) / report.makespan == pytest.approx(share, abs=6e-4)
    assert max(p.live for p in report.peaks) == peak


@pytest.mark.parametrize("ranks", [2, 4, 7, 16])
def test_short_steps_have_the_documented_bubble_and_no_larger_peak(ranks):
    for count in range(1, 2 * ranks):
        bubble = 4 * ranks - 2 - 2 * count if count <= ranks else 2 * (ranks - 1) + 2 * (2 * ranks - count)
        reports = [check(make_schedule("dualpipev", ranks, count))]
        if 2 * ranks <= 16:
            reports.append(check(make_schedule("dualpipe", 2 * ranks, 2 * count)))
        for report in reports:
            assert max(report.bubble) == bubble
            assert max(peak.kept for peak in report.peaks) <= min(2 * count, 2 * ranks + 1)


def test_odd_dualpipe_beats_1f1b():
    for count in (1, 3, 15, 23, 31, 33, 121):
        odd = check(make_schedule("dualpipe", 16, count)).makespan
        assert odd < check(make_schedule("1f1b", 16, count)).makespan


def test_pp16_m120_is_checked_in_a_blink():
    start = time.process_time()
    check(make_schedule("dualpipe", 16, 120))
    assert time.process_time() - start < 1.0  # 0.16 s measured; slack for a busy machine


def test_message_time_can_only_lengthen_a_step():
    for name, ranks in (("1f1b", 4), ("zb1p", 4), ("dualpipe", 4), ("dualpipev", 4)):
        spans = [check(make_schedule(name, ranks, 12), Costs(message=m)).makespan for m in (0.0, 0.1, 1.0, 5.0)]
        assert spans == sorted(spans)


def test_stage_costs_can_differ():
    def slow_last(step):
        if isinstance(step, Transfer):
            return 0.0
        return sum(Costs()(action) * (2.0 if action.stage == 3 else 1.0) for action in parts(step))

    assert check(make_schedule("1f1b", 4, 8), slow_last).makespan > check(make_schedule("1f1b", 4, 8)).makespan


def test_documented_example_prints_what_the_page_says():
    page = Path(__file__).parents[2] / "docs" / "schedules.md"
    assert doctest.testfile(str(page), module_relative=False) == (0, 3)


def test_summary_tells_notes_and_ranks():
    text = check(make_schedule("dualpipev", 2, 3)).summary()
    assert "fewer pairs overlap" in text and len(text.splitlines()) == 3 + 2


# Faults. Each makes a sound schedule unsound; the error names the place.


def edit(schedule, rank: int, change):
    """The schedule with one rank's list replaced by change(list)."""
    lists = list(schedule.actions)
    lists[rank] = tuple(change(list(lists[rank])))
    return replace(schedule, actions=tuple(lists))


def without(step):
    return lambda steps: [other for other in steps if other != step]


def positions(schedule, rank, wanted):
    return [i for i, step in enumerate(schedule.actions[rank]) if wanted(step)]


LOWERED = [lower(make_schedule(name, 4, 10)) for name in NAMES]


@pytest.mark.parametrize("schedule", LOWERED, ids=NAMES)
@pytest.mark.parametrize("kind", ["SEND", "RECV", "FREE"])
def test_any_dropped_transfer_is_found(schedule, kind):
    for rank in range(4):
        for step in schedule.actions[rank]:
            if isinstance(step, Transfer) and step.kind == kind:
                with pytest.raises(ScheduleError, match=f"rank {rank}"):
                    check(edit(schedule, rank, without(step)))


@pytest.mark.parametrize("schedule", LOWERED, ids=NAMES)
def test_any_message_dropped_on_both_sides_is_found(schedule):
    for rank in range(4):
        for step in schedule.actions[rank]:
            if isinstance(step, Transfer) and step.kind == "SEND":
                stage = step.stage + (1 if step.channel == "act" else -1)
                broken = edit(schedule, rank, without(step))
                broken = edit(broken, step.peer, without(Transfer("RECV", step.channel, stage, *step[3:5], rank)))
                with pytest.raises(ScheduleError, match="rank"):
                    check(broken)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_any_missing_duplicated_or_renumbered_action_is_found(name, lowered):
    schedule = make_schedule(name, 4, 10)
    schedule = lower(schedule) if lowered else schedule
    for rank in range(4):
        for i, step in enumerate(schedule.actions[rank]):
            if isinstance(step, Transfer):
                continue
            other = (parts(step)[0].micro_batch + 1) % 10
            renumbered = parts(step)[0]._replace(micro_batch=other)
            for change in (
                lambda steps, i=i: steps[:i] + steps[i + 1 :],
                lambda steps, i=i: steps[: i + 1] + steps[i:],
                lambda steps, i=i, new=renumbered: [*steps[:i], new, *steps[i + 1 :]],
            ):
                with pytest.raises(ScheduleError, match=f"rank {rank}"):
                    check(edit(schedule, rank, change))


@pytest.mark.parametrize("schedule", LOWERED, ids=NAMES)
def test_swapped_micro_batches_are_found(schedule):
    for rank in range(4):
        for kind in "FB":
            spots = positions(schedule, rank, lambda s, kind=kind: isinstance(s, Action) and s.kind == kind)
            spots = [i for i in spots if schedule.actions[rank][i].stage == schedule.actions[rank][spots[0]].stage]
            if len(spots) < 2:
                continue
            a, b = spots[:2]

            def swap(steps, a=a, b=b):
                steps[a], steps[b] = steps[b], steps[a]
                return steps

            with pytest.raises(ScheduleError, match=f"rank {rank}, action {a}"):
                check(edit(schedule, rank, swap))


@pytest.mark.parametrize("schedule", LOWERED, ids=NAMES)
def test_swapped_posts_of_a_link_are_found(schedule):
    for rank in range(4):
        for kind in ("SEND", "RECV"):
            mine = positions(schedule, rank, lambda s, kind=kind: isinstance(s, Transfer) and s.kind == kind)
            for a, b in zip(mine, mine[1:]):
                here, there = schedule.actions[rank][a], schedule.actions[rank][b]
                if here.channel != there.channel or here.peer != there.peer:
                    continue

                def swap(steps, a=a, b=b):
                    steps[a], steps[b] = steps[b], steps[a]
                    return steps

                with pytest.raises(ScheduleError, match="rank"):
                    check(edit(schedule, rank, swap))


def test_w_never_run_is_found_and_named():
    schedule = make_schedule("zb1p", 4, 8)
    last = schedule.actions[2][-1]
    with pytest.raises(ScheduleError, match="rank 2: its list ends without the weight gradient of 2.7"):
        check(edit(schedule, 2, without(last)))


def test_w_out_of_turn_is_found():
    schedule = make_schedule("zb1p", 4, 8)

    def swap(steps):
        steps[-1], steps[-2] = steps[-2], steps[-1]
        return steps

    with pytest.raises(ScheduleError, match="next weight gradient of stage 2 is due for micro-batch 6"):
        check(edit(schedule, 2, swap))


def test_full_backward_while_older_w_waits_is_found():
    """Otherwise weight gradients would be summed in another order than one process sums them."""
    schedule = make_schedule("zb1p", 2, 3)
    assert " ".join(map(str, schedule.actions[1][:5])) == "F1.0 I1.0 F1.1 I1.1 W1.0"

    def change(found):
        found[3:5] = [Action("B", 1, 1), Action("W", 1, 0)]
        return found

    with pytest.raises(ScheduleError, match="next weight gradient of stage 1 is due for micro-batch 0"):
        check(edit(schedule, 1, change))


def test_pair_with_its_own_backward_is_found():
    schedule = make_schedule("1f1b", 1, 1)
    with pytest.raises(ScheduleError, match="waits for F0.0"):
        check(replace(schedule, actions=((Pair(Action("F", 0, 0), Action("B", 0, 0)),),)))


DEADLOCK = """
schedule by hand
micro_batches 2
route 0 1
reverse_from 2
rank 0
F0.0
SEND act 0.0 > 1
RECV grad 0.0 < 1
B0.0
F0.1
SEND act 0.1 > 1
RECV grad 0.1 < 1
B0.1
FREE act 0.0 | 1
FREE act 0.1 | 1
rank 1
RECV act 1.0 < 0
F1.0
RECV act 1.1 < 0
F1.1
B1.0
SEND grad 1.0 > 0
B1.1
SEND grad 1.1 > 0
FREE grad 1.0 | 0
FREE grad 1.1 | 0
"""


def test_deadlock_names_ranks_actions_and_what_they_wait_for():
    """Rank 0 wants gradient 0 before it makes forward 1; rank 1 wants forward 1 before it makes gradient 0."""
    with pytest.raises(ScheduleError) as error:
        check(parse_schedule(DEADLOCK.replace("reverse_from 2", "reverse_from 2\nlowered")))
    assert "rank 0, action 3 (B0.0): waits for the message grad 0.0" in str(error.value)
    assert "rank 1, action 3 (F1.1): waits for the message act 1.1" in str(error.value)
    compute = "\n".join(line for line in DEADLOCK.splitlines() if not line.startswith(("SEND", "RECV", "FREE")))
    with pytest.raises(ScheduleError, match=r"rank 0, action 1 \(B0.0\): waits for the backward of 1.0 for ever"):
        check(parse_schedule(compute))
