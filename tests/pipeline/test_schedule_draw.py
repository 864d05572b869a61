"""Pictures of schedules."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from deepv3.errors import ScheduleError
from deepv3.pipeline.draw import DOCUMENTED, draw, svg
from deepv3.pipeline.dryrun import Costs
from deepv3.pipeline.lower import lower
from deepv3.pipeline.schedule import make_schedule

PICTURES = Path(__file__).parents[2] / "docs" / "schedules"


@pytest.mark.parametrize(("file", "name", "ranks", "count"), DOCUMENTED)
def test_documented_picture_is_what_the_schedule_gives_now(file, name, ranks, count):
    drawn = svg(make_schedule(name, ranks, count))
    assert (PICTURES / f"{file}.svg").read_text() == drawn, "run: python -m deepv3.pipeline.draw docs/schedules"
    assert len(drawn) < 25_000


def test_documentation_shows_every_picture_and_no_other():
    page = (PICTURES.parent / "schedules.md").read_text()
    assert sorted(path.stem for path in PICTURES.glob("*.svg")) == sorted(row[0] for row in DOCUMENTED)
    assert all(f"(schedules/{row[0]}.svg)" in page for row in DOCUMENTED)


def test_svg_is_well_formed_and_has_a_box_and_a_number_per_chunk(tmp_path):
    schedule = make_schedule("dualpipe", 4, 8)
    draw(lower(schedule), tmp_path / "a.svg", Costs(49, 75, 32, 144))
    root = ET.parse(tmp_path / "a.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    chunks = sum(2 if "&" in str(step) else 1 for steps in schedule.actions for step in steps)
    assert sum(path.get("d").count("M") for path in root.iter(f"{space}path")) == chunks
    assert len(list(root.iter(f"{space}text"))) == chunks + 4 + 1


def test_png_is_drawn(tmp_path):
    draw(make_schedule("1f1b", 2, 3), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r"ends in '\.gif'"):
        draw(make_schedule("1f1b", 2, 3), tmp_path / "a.gif")
