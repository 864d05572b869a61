"""Events of a run: whole lines, in order, never the reason for a run to end."""

import json

from deepv3.train.events import EventLog, read_events


def test_events_come_back_in_the_order_they_happened_even_when_steps_go_back(tmp_path):
    log = EventLog(tmp_path)
    log.add("save", 40, "checkpoints/step-00000040")
    log.add("skip", 43, "gradient norm not finite")
    log.add("rewind", 40, "loss spike\nat step 43")
    rows = read_events(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [("save", 40), ("skip", 43), ("rewind", 40)]
    assert rows[2]["text"] == "loss spike at step 43"
    assert rows[0]["time"] <= rows[2]["time"]


def test_two_writers_share_one_file(tmp_path):
    first, second = EventLog(tmp_path), EventLog(tmp_path)
    for step in range(5):
        first.add("save", step, "a")
        second.add("alarm", step, "b")
    assert len(read_events(tmp_path)) == 10


def test_a_torn_or_foreign_line_is_left_out(tmp_path):
    log = EventLog(tmp_path)
    log.add("save", 1, "x")
    with open(log.path, "a") as file:
        file.write('{"a": 1}\n[]\n' + json.dumps({"time": 1, "step": 2, "kind": "save"})[:-4])
    assert [row["step"] for row in read_events(tmp_path)] == [1]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    EventLog(tmp_path / "gone").add("save", 1, "x")
    assert read_events(tmp_path / "gone") == []
