"""The lists themselves: phase counts, order, small and odd micro-batch counts, refusals."""

import subprocess
import sys
from collections import Counter

import pytest

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import Pair, parts
from deepv3.pipeline.dualpipe import phases
from deepv3.pipeline.schedule import SCHEDULES, forward_only, make_schedule, micro_batches


def kinds(schedule, rank: int) -> Counter:
    return Counter("F&B" if isinstance(step, Pair) else step.kind for step in schedule.compute(rank))


def test_pipeline_schedules_do_not_import_torch():
    code = "import sys, deepv3.pipeline.check, deepv3.pipeline.draw, deepv3.pipeline.layout, deepv3.pipeline.text\n"
    code += "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 10, 12, 14, 16])
def test_dualpipe_phases_repeat_as_often_as_published(ranks):
    count, half = 2 * ranks + 6, ranks // 2
    n = count // 2
    for h in range(half):
        units = {phase.name: phase.repeats for phase in phases(half, h, n)}
        steady = n - ranks + h + 1
        assert units["1 F0"] == 2 * (half - h - 1)
        assert units["2 F0F1"] == h + 1
        assert units["3 I1WF1"] == half - h - 1
        assert units["4 F0B1F1B0, first"] + units["4 F0&B1 F1&B0"] == steady
        assert units["4 F0B1F1B0, first"] == (h == half - 1)
        assert units["5 B1 F1&B0"] == half - h - 1
        assert units["6 B1B0"] + units["6 B1I0"] + units["6 I1I0"] == h + 1
        assert units["6 B1I0"] + 2 * units["6 I1I0"] == h + 1, "the last h+1 backwards of phase 6 defer their W"
        assert units["7 WI0"] == half - h - 1
        assert units["8 W"] == h + 1


def test_dualpipe_at_pp16_m120_has_the_published_counts_on_every_rank():
    schedule = make_schedule("dualpipe", 16, 120)
    for rank in range(16):
        h = min(rank, 15 - rank)
        inner = h == 7
        found = kinds(schedule, rank)
        assert found["F"] == (17 if inner else 23 - h)
        assert found["B"] + found["I"] == (17 if inner else 23 - h)
        assert found["I"] == found["W"] == 15 - h
        assert found["F&B"] == (103 if inner else 97 + h)


def test_middle_ranks_run_their_first_forward_and_backward_one_after_the_other():
    for rank in (7, 8):
        steps = list(make_schedule("dualpipe", 16, 120).compute(rank))
        first = next(i for i, step in enumerate(steps) if "B" in {a.kind for a in parts(step)})
        assert steps[first].kind == "B" and steps[first - 1].kind == "F" and isinstance(steps[first + 1], Pair)
    steps = list(make_schedule("dualpipev", 8, 60).compute(7))
    first = next(i for i, step in enumerate(steps) if "B" in {a.kind for a in parts(step)})
    assert [str(step) for step in steps[first - 1 : first + 2]] == ["F7.8", "B8.0", "F8.8&B7.0"]


def test_dualpipe_directions_enter_at_opposite_ends():
    schedule = make_schedule("dualpipe", 4, 8)
    assert schedule.routes == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert str(schedule.actions[0][0]) == "F0.0" and str(schedule.actions[3][0]) == "F0.4r"
    assert [schedule.chunks(rank) for rank in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]


def test_dualpipev_begins_and_ends_on_rank_0():
    schedule = make_schedule("dualpipev", 4, 8)
    assert schedule.routes == ((0, 1, 2, 3, 3, 2, 1, 0),)
    assert [schedule.chunks(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_mirrored_ranks_run_mirrored_lists():
    schedule = make_schedule("dualpipe", 8, 20)
    for rank in range(4):
        mirrored = []
        for step in schedule.compute(7 - rank):
            turned = [a._replace(micro_batch=(a.micro_batch + 10) % 20, direction=1 - a.direction) for a in parts(step)]
            mirrored.append(Pair(*turned) if len(turned) == 2 else turned[0])
        assert list(schedule.compute(rank)) == mirrored


def test_1f1b_is_the_textbook_list():
    schedule = make_schedule("1f1b", 3, 4)
    assert " ".join(map(str, schedule.actions[0])) == "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3"
    assert " ".join(map(str, schedule.actions[2])) == "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 9])
def test_small_counts_run_every_chunk_and_say_what_is_less(name, count):
    schedule = make_schedule(name, 4, count)
    for rank in range(4):
        ran = Counter((a.kind, a.stage, a.micro_batch) for step in schedule.compute(rank) for a in parts(step))
        assert set(ran.values()) == {1}
        for direction, route in enumerate(schedule.routes):
            for stage in (stage for stage, holder in enumerate(route) if holder == rank):
                mine = [i for i in range(count) if schedule.direction(i) == direction]
                assert all(ran[("F", stage, i)] and ran[("B", stage, i)] + ran[("I", stage, i)] == 1 for i in mine)
    less = name.startswith("dualpipe") and (count < 8 or (name == "dualpipe" and count % 2 == 1))
    assert bool(schedule.notes) == less


@pytest.mark.parametrize(
    ("name", "ranks", "count", "both_sides"),
    [
        ("dualpipe", 16, 24, ["2 x parallel.pp_size = 32", "has 24"]),
        ("dualpipe", 4, 9, ["even number of micro-batches", "has 9"]),
        ("dualpipev", 8, 15, ["2 x parallel.pp_size = 16", "has 15"]),
        ("dualpipe", 1, 8, ["even number of pipeline ranks", "parallel.pp_size = 1"]),
    ],
)
def test_strict_refuses_what_would_be_noted(name, ranks, count, both_sides):
    note = make_schedule(name, ranks, count).notes[0]
    with pytest.raises(ScheduleError) as error:
        make_schedule(name, ranks, count, strict=True)
    for part in both_sides:
        assert part in note and part in str(error.value)
    for knob in ("parallel.strict", "dp", "parallel.pp_size"):
        assert knob in str(error.value)


@pytest.mark.parametrize(("name", "ranks", "count"), [("dualpipe", 16, 32), ("dualpipev", 8, 17), ("1f1b", 8, 1)])
def test_strict_accepts_the_full_schedule(name, ranks, count):
    assert make_schedule(name, ranks, count, strict=True).notes == ()


def test_odd_count_leaves_direction_1_one_micro_batch_short():
    schedule = make_schedule("dualpipe", 4, 15)
    assert schedule.reverse_from == 8 and "direction 1 runs 7 micro-batches, direction 0 8" in schedule.notes[0]


def test_dualpipe_on_one_rank_runs_as_1f1b_and_says_so():
    schedule = make_schedule("dualpipe", 1, 8)
    assert schedule.name == "1f1b" and "1f1b runs instead" in schedule.notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 4, 8), "parallel.schedule=gpipe"),
        (("1f1b", 0, 8), "parallel.pp_size >= 1"),
        (("1f1b", 4, 0), "at least 1 micro-batch"),
        (("dualpipe", 5, 20), "parallel.pp_size=4 or 6"),
    ],
)
def test_impossible_schedules_are_refused_with_the_knob(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        make_schedule(*arguments)


def test_forward_only_keeps_the_order_of_the_forwards():
    full = make_schedule("dualpipev", 4, 9)
    short = forward_only(full)
    for rank in range(4):
        forwards = [a for step in full.compute(rank) for a in parts(step) if a.kind == "F"]
        assert list(short.actions[rank]) == forwards


def test_micro_batch_count_is_the_quotient():
    assert micro_batches(15360, 128, 1) == 120
    assert micro_batches(1920, 128, 1) == 15
    assert micro_batches(64, 4, 8) == 2


def test_fractional_count_is_refused_with_the_dp_and_pp_that_fit():
    with pytest.raises(ScheduleError) as error:
        micro_batches(480, 128, 1, pp_size=16)
    message = str(error.value)
    assert "3.75" in message and "dp=120 fits (4 micro-batches on 1920 ranks)" in message
    assert "parallel.pp_size=64 with dp=32 (15 micro-batches)" in message
    assert micro_batches(480, 120, 1) == 4 and micro_batches(480, 32, 1) == 15


def test_batch_that_no_dp_fits_is_refused_with_both_batch_sizes():
    with pytest.raises(ScheduleError, match="global batch 10 / train.micro_batch_size 4 = 2.5"):
        micro_batches(10, 2, 4)
    with pytest.raises(ScheduleError, match="global batch 2 / train.micro_batch_size 4 = 0.5"):
        micro_batches(2, 1, 4)
