"""Schedules as text."""

import pytest

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import Action, Pair, Transfer, parse_step
from deepv3.pipeline.lower import lower
from deepv3.pipeline.schedule import SCHEDULES, forward_only, make_schedule
from deepv3.pipeline.text import format_schedule, parse_schedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [1, 5, 12])
def test_text_and_back_is_the_same_schedule(name, count):
    schedule = make_schedule(name, 4, count)
    for one in (schedule, lower(schedule), forward_only(schedule), lower(forward_only(schedule))):
        text = format_schedule(one)
        assert parse_schedule(text) == one
        assert format_schedule(parse_schedule(text)) == text


def test_one_changed_action_is_one_changed_line():
    schedule = make_schedule("zb1p", 4, 8)
    before = format_schedule(schedule).splitlines()
    after = format_schedule(make_schedule("zb1p", 4, 8)).replace("I2.3\n", "B2.3\n").splitlines()
    assert sum(a != b for a, b in zip(before, after)) == 1


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("F0.5", Action("F", 0, 5)),
        ("I12.34r", Action("I", 12, 34, 1)),
        ("F0.5&B3.2r", Pair(Action("F", 0, 5), Action("B", 3, 2, 1))),
        ("SEND act 0.5 > 1", Transfer("SEND", "act", 0, 5, 0, 1)),
        ("RECV grad 3.2r < 1", Transfer("RECV", "grad", 3, 2, 1, 1)),
        ("FREE act 0.5 | 1", Transfer("FREE", "act", 0, 5, 0, 1)),
    ],
)
def test_actions_read_as_they_are_written(text, step):
    assert parse_step(text) == step and str(step) == text


def test_comments_and_blank_lines_are_dropped():
    text = format_schedule(make_schedule("1f1b", 2, 2))
    assert parse_schedule("# by hand\n\n" + text.replace("rank 1", "\nrank 1")) == make_schedule("1f1b", 2, 2)


GOOD = format_schedule(make_schedule("1f1b", 2, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("F1.0", "X1.0", "line 9: 'X1.0' is no action"),
        ("F1.0", "F1.0&F0.1", "line 9: 'F1.0&F0.1' is no pair"),
        ("F1.0", "SEND act 0.0 < 1", "line 9: 'SEND act 0.0 < 1' is no action"),
        ("rank 1", "rank 2", "line 8: 'rank 2' stands where 'rank 1' is due"),
        ("route 0 1", "route 0 x", "line 3: '0 x' holds something else"),
        ("route 0 1", "route 0 2", r"the routes name ranks \[0, 2\]"),
        ("route 0 1", "path 0 1", "line 3: 'path 0 1' is no heading"),
        ("route 0 1\n", "", "'route' lines"),
        ("micro_batches 1\n", "", "'micro_batches <number>' is missing"),
    ],
)
def test_wrong_text_is_refused_with_its_line(old, new, message):
    assert old in GOOD
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(GOOD.replace(old, new))
