"""The console: one calm line that says what matters, plain lines where there is no terminal."""

import io

import pytest
from rich.console import Console

from deepv3.train import progress
from deepv3.train.progress import LiveLine, duration

ROW = {"step": 7, "loss_main": 3.14159, "tokens_per_second": 12345.6, "max_vio": 0.25, "step_seconds": 2.0}


def line(monkeypatch, terminal: bool) -> tuple[LiveLine, io.StringIO]:
    """A live line that writes into a string, as on a terminal 100 columns wide or into a file."""
    live, text = LiveLine(True), io.StringIO()
    live.console = Console(file=text, force_terminal=terminal, width=100, highlight=False)
    live._live = terminal
    monkeypatch.setattr(progress, "print", lambda said, flush: text.write(said + "\n"), raising=False)
    return live, text


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (61.9, "1:01"), (3723, "1:02:03"), (-5, "0:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_file_gets_a_line_now_and_then_and_the_last_one(monkeypatch):
    live, text = line(monkeypatch, terminal=False)
    now = iter([100.0, 100.0, 101.0, 105.0, 111.0, 111.0, 112.0, 112.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    for step, fraction in enumerate((0.1, 0.2, 0.3, 0.4, 1.0), 1):
        live.update(ROW | {"step": step}, fraction, None)
    steps = [said.split("step ")[1].split()[0] for said in text.getvalue().splitlines()]
    assert steps == ["1", "4", "5"]


def test_the_line_tells_loss_validation_speed_balance_and_time_left(monkeypatch):
    live, text = line(monkeypatch, terminal=False)
    live.update(ROW, 0.25, None)
    live._last_plain = -1e9
    live.update(ROW | {"step": 8}, 0.5, 3.3)
    said = text.getvalue().splitlines()[-1]
    assert said == " 50.0%  step 8  loss 3.142  val 3.300  12,346 tok/s  MaxVio 0.25  ETA 0:04"


def test_a_terminal_keeps_one_line_below_what_is_said(monkeypatch):
    live, text = line(monkeypatch, terminal=True)
    for step in range(1, 6):
        live.update(ROW | {"step": step}, step / 5, None)
    live.say("a line that stays")
    live.close()
    assert "a line that stays" in text.getvalue() and "step 5" in text.getvalue()
    assert text.getvalue().count("\n") <= 4, "the live line was repeated"


def test_other_ranks_are_silent(capsys):
    live = LiveLine(False)
    live.update(ROW, 0.5, None)
    live.close()
    assert capsys.readouterr().out == ""
