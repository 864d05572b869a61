"""The profiler window: its steps and ranks only, a trace that opens, a table, and a refusal where it cannot be."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from deepv3.config.schema import LoggingConfig
from deepv3.errors import ConfigError
from deepv3.train.events import read_events
from deepv3.train.profiler import Window


def grid(rank: int = 0, world_size: int = 2) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))


def settings(*steps: int, **more) -> LoggingConfig:
    return LoggingConfig(profile_steps=list(steps), **more)


def work(window: Window, steps: range) -> list:
    """Steps that each multiply once; what the window wrote."""
    written = []
    for step in steps:
        window.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        written += window.after(step)
    return written


def test_the_steps_of_the_window_are_recorded_and_no_others(tmp_path):
    table, trace = work(Window(settings(3, 4), tmp_path, grid()), range(1, 8))
    assert trace.name == "steps-3-4-rank0.trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    assert "2 step(s)" in table.read_text() and "x1     aten::mm" in table.read_text()
    assert [event["kind"] for event in read_events(tmp_path)] == ["profile"]


def test_a_rank_that_is_not_asked_for_records_nothing(tmp_path):
    assert work(Window(settings(1, 2), tmp_path, grid(rank=1)), range(1, 4)) == []
    assert len(work(Window(settings(1, 2, profile_ranks=[1]), tmp_path, grid(rank=1)), range(1, 4))) == 2


def test_off_costs_nothing(tmp_path):
    window = Window(settings(), tmp_path, grid())
    assert work(window, range(1, 4)) == [] and window.done and not list(tmp_path.iterdir())


def test_a_run_that_resumes_inside_the_window_records_the_rest(tmp_path):
    written = work(Window(settings(3, 6), tmp_path, grid()), range(5, 9))
    assert written[0].name == "steps-5-6-rank0.txt"


def test_a_run_that_ends_inside_the_window_keeps_what_it_has(tmp_path):
    window = Window(settings(2, 9), tmp_path, grid())
    assert work(window, range(1, 4)) == []
    assert [path.name for path in window.close(3)] == ["steps-2-3-rank0.txt", "steps-2-3-rank0.trace.json.gz"]
    assert window.close(3) == []


def test_the_history_of_allocations_is_refused_without_cuda(tmp_path):
    with pytest.raises(ConfigError, match="profile_memory = true on cpu.*profile_steps alone"):
        Window(settings(1, 2, profile_memory=True), tmp_path, grid())


def test_a_rank_beyond_the_world_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"names rank 2, but the run has 2 rank\(s\), 0 to 1"):
        Window(settings(1, 2, profile_ranks=[0, 2]), tmp_path, grid())


@pytest.mark.gpu
def test_a_window_on_a_gpu_leaves_trace_table_and_memory(tmp_path):
    device = SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda"))
    window = Window(settings(1, 1, profile_memory=True), tmp_path, device)
    window.before(1)
    torch.ones(512, 512, device="cuda") @ torch.ones(512, 512, device="cuda")
    table, trace, memory = window.after(1)
    assert "sum of kernels" in table.read_text() and trace.stat().st_size and memory.stat().st_size
