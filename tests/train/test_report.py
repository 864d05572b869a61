"""The report: self-contained, complete, well-formed, small for long runs, and redrawn without disturbing the run."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_folder import row, write

from deepv3.errors import ConfigError, DataError
from deepv3.train import report
from deepv3.train.events import EventLog, note_end
from deepv3.train.report import Reporter, write_comparison, write_report
from deepv3.train.report_compare import differences, find_runs, names, results
from deepv3.train.report_page import Folder, page

SCRIPT = Path(__file__).parents[2] / "launch" / "report.py"
VOID = {"meta", "link", "img", "br"}


class Nesting(HTMLParser):
    """Collects elements and checks that every one is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.hrefs += [found["href"]] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "good")


@pytest.fixture(scope="module")
def text(run) -> str:
    return page(Folder.read(run))


def test_the_page_is_well_formed_and_its_links_lead_somewhere(text):
    nesting = Nesting(text)
    assert len(nesting.ids) == len(set(nesting.ids))
    assert {href[1:] for href in nesting.hrefs if href.startswith("#")} <= set(nesting.ids)


def test_the_page_fetches_nothing(text):
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert all(found.startswith(("data:", "#")) for found in re.findall(r'(?:src|href)="([^"]*)"', text))


FIGURES = (
    "loss", "grad_norm", "lr", "batch", "rate", "mfu", "time", "memory", "max_vio", "vio_layers", "bias", "dead",
    "fanout", "entropy", "load_now", "load_time",
)  # fmt: skip


@pytest.mark.parametrize("figure", FIGURES)
def test_the_page_shows(figure, text):
    assert f'id="{figure}"' in text


def test_parts_of_a_step_that_no_row_has_are_not_drawn(run, tmp_path):
    other = tmp_path / "r"
    shutil.copytree(run, other)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("time_bubble", "time_comm_hidden")} for line in lines]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert "bubble" in page(Folder.read(run)) and "hidden communication" in page(Folder.read(run))
    assert "bubble" not in page(Folder.read(other)) and "hidden communication" not in page(Folder.read(other))


def test_events_are_listed_escaped_and_marked_in_the_charts(text):
    assert "loss spike &lt;b&gt;of 9 sigma&lt;/b&gt;" in text and "<b>of 9" not in text
    assert 'class="mark rewind"' in text and 'class="mark save"' not in text


def test_the_state_is_that_of_the_newest_event(run, tmp_path):
    assert Folder.read(run).state()[0] == "finished"
    write(tmp_path)
    EventLog(tmp_path).add("restart", 60, "goes on")
    assert Folder.read(tmp_path).state()[0] == "running"
    note_end(tmp_path, 61, KeyboardInterrupt())
    assert Folder.read(tmp_path).state()[0] == "stopped"
    note_end(tmp_path, 61, ValueError("shape"))
    assert Folder.read(tmp_path).state() == ("failed", "ValueError: shape")
    (tmp_path / "exit.json").write_text('{"code": 75, "reason": "rank 3 is silent", "rank": 0, "step": 61}')
    assert Folder.read(tmp_path).state() == ("stopped", "rank 3 is silent")


def test_a_finished_run_that_is_started_again_ends_only_once(run):
    before = (run / "events.jsonl").read_bytes()
    note_end(run, 120, None)
    assert (run / "events.jsonl").read_bytes() == before


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    assert "No step is recorded yet" in page(Folder.read(tmp_path))


def test_a_model_without_experts_has_no_expert_section(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write(json.dumps(row(1, random.Random(0), max_vio_layers=[])) + "\n")
    text = page(Folder.read(tmp_path))
    assert 'id="s-experts"' not in text and 'id="loss"' in text


def test_a_long_run_makes_a_small_page_quickly(tmp_path):
    write(tmp_path, steps=20_000)
    began = time.process_time()
    path = write_report(tmp_path)
    assert path.stat().st_size < 1.5e6
    assert time.process_time() - began < 20


def test_the_reporter_draws_in_the_background_and_leaves_the_last_state(run, tmp_path, monkeypatch):
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    reporter = Reporter(folder)
    reporter.refresh()
    reporter._thread.join()
    assert (folder / "report.html").exists()
    first = reporter._thread
    reporter.refresh()
    assert reporter._thread is first, "a second redraw so soon"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row(121, random.Random(0))) + "\n")
    assert [p.name for p in reporter.close()] == ["report.html", "loss.png", "expert_load.png"]
    assert "from 121 rows" in (folder / "report.html").read_text()
    assert not list(folder.glob(".*")), "half a file stays"


def test_a_full_disk_spoils_the_picture_and_not_the_run(run, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "publish", full)
    reporter = Reporter(run)
    reporter.refresh()
    reporter._thread.join()
    assert "No space left" in capsys.readouterr().err
    assert reporter.close() == []


# -- comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for i, lr in enumerate((1e-3, 1e-3, 2e-3)):
        write(folder / f"{i}-lr-{lr}", steps=30, lr=lr, seed=i)
    (folder / "10-lr").mkdir()
    (folder / "10-lr" / "metrics.jsonl").write_text("")
    return folder


def test_a_sweep_stands_for_its_jobs_in_their_order(sweep):
    assert [p.name for p in find_runs([str(sweep)])] == ["0-lr-0.001", "1-lr-0.001", "2-lr-0.002", "10-lr"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no metrics.jsonl"):
        find_runs([str(tmp_path)])


def test_differences_name_the_fields_that_are_not_all_equal():
    a = {"run_dir": "a", "seed": 0, "optim": {"lr": 1, "eps": 2}}
    b = {"run_dir": "b", "seed": 0, "optim": {"lr": 3, "eps": 2, "new": True}}
    assert differences([a, b]) == {"optim.lr": ["1", "3"], "optim.new": ["–", "True"]}


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [Folder.read(write(tmp_path / parent / "run", steps=2)) for parent in ("a", "b")]
    assert names(runs) == ["a/run", "b/run"]


def test_results_are_those_of_the_run(sweep):
    figures = results(Folder.read(sweep / "2-lr-0.002"))
    assert figures["step"] == 30 and figures["skipped"] == 0 and figures["tokens/s/device"] == 1500.0
    assert figures["hours"] == pytest.approx(30 / 3600)


def test_the_comparison_marks_the_deviating_value_and_the_best(sweep, tmp_path):
    path = write_comparison(find_runs([str(sweep)])[:3], tmp_path / "c.html")
    text = path.read_text()
    Nesting(text)
    assert '<td class="differs">0.002</td>' in text and '<td class="differs">0.001</td>' not in text
    assert text.count('class="line') >= 3 * 5 and 'class="best"' in text


def test_a_comparison_never_overwrites_the_report_of_a_run(sweep):
    runs = find_runs([str(sweep)])[:2]
    with pytest.raises(ConfigError, match="is the report of one of the runs"):
        write_comparison(runs, runs[0] / "report.html")


def test_the_command_compares_and_refuses(sweep):
    def call(*arguments):
        return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)

    done = call(f"runs=[{sweep / '0-lr-0.001'},{sweep / '2-lr-0.002'}]")
    assert done.returncode == 0 and (sweep / "report.html").exists(), done.stderr
    refused = call("run=[a]")
    assert refused.returncode == 2 and "neither runs=" in refused.stderr and "Traceback" not in refused.stderr
