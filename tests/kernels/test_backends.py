"""The choice among implementations: what is tried, what is left out, what is kept, and how it is overridden."""

import json
import warnings

import pytest
import torch
from inputs import Maker
from inputs8 import make

from deepv3.kernels import backends, gemm8

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RIGHT = torch.arange(6.0)


def refuse() -> torch.Tensor:
    raise ValueError("not this shape")


TABLE = {
    "slow": lambda: RIGHT.clone(),
    "fast": lambda: RIGHT + 1e-6,
    "wrong": lambda: RIGHT + 1.0,
    "refusing": refuse,
    "not a number": lambda: RIGHT / 0.0,
}


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device that takes a microsecond for `fast` and two for everything else; its file is tmp_path / kernels.json."""
    measured = []

    def time(call) -> float:
        measured.append(call())
        return 1.0 if torch.equal(measured[-1], RIGHT + 1e-6) else 2.0

    monkeypatch.setattr(backends, "_time", time)
    monkeypatch.setattr(backends, "_machine", lambda: "this machine")
    monkeypatch.setattr(backends, "_forced", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backends.use_file(tmp_path / "deep" / "kernels.json")
    yield measured
    backends.use_file(None)


def choose(shape=(4, 5), unasked=tuple(TABLE), where=CUDA) -> str:
    return backends.choose("op", shape, TABLE, unasked, lambda implementation: implementation(), where)


def test_the_fastest_right_one_is_chosen_and_the_others_say_why_not(device):
    assert choose() == "fast"
    (entry,) = backends.choices().values()
    assert entry["us"] == {"slow": 2.0, "fast": 1.0}
    assert entry["left_out"]["refusing"] == "ValueError: not this shape"
    assert "off by" in entry["left_out"]["wrong"] and "inf" in entry["left_out"]["not a number"]


def test_a_shape_is_measured_once_and_read_from_the_file_afterwards(device, tmp_path):
    assert choose() == choose() == "fast" and len(device) == 2
    choose((7, 8))
    assert len(device) == 4
    path = tmp_path / "deep" / "kernels.json"
    assert set(json.loads(path.read_text())["this machine"]) == {"op 4 x 5", "op 7 x 8"}
    backends.use_file(path)  # as a new process would
    assert choose() == "fast" and len(device) == 4


def test_what_other_processes_and_machines_wrote_stays(device, tmp_path):
    path = tmp_path / "deep" / "kernels.json"
    path.parent.mkdir()
    choose()
    content = json.loads(path.read_text())
    content["another machine"], content["this machine"]["other op"] = (
        {"a": 1},
        {"best": "slow", "us": {}, "left_out": {}},
    )
    path.write_text(json.dumps(content))
    choose((7, 8))
    content = json.loads(path.read_text())
    assert content["another machine"] == {"a": 1} and len(content["this machine"]) == 3


def test_a_broken_file_is_measured_anew(device, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    backends.use_file(path)
    assert choose() == "fast" and "op 4 x 5" in json.loads(path.read_text())["this machine"]


def test_a_file_that_cannot_be_written_warns_once_and_choices_stay_in_memory(device, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    backends.use_file(blocked / "kernels.json")
    with pytest.warns(UserWarning, match="use_file"):
        assert choose() == "fast"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == "fast" and choose((7, 8)) == "fast"
    assert set(backends.choices()) == {"op 4 x 5", "op 7 x 8"} and len(device) == 4


def test_only_those_that_may_run_unasked_are_measured(device):
    assert choose(unasked=("slow", "wrong")) == "slow"
    assert choose((9, 9), unasked=("slow",)) == "slow" and "op 9 x 9" not in backends.choices()


def test_a_choice_that_may_no_longer_run_is_measured_again(device):
    assert choose() == "fast"
    assert choose(unasked=("slow", "wrong")) == "slow"


def test_force_wins_and_an_unknown_name_lists_the_known_ones(device):
    backends.force("op", "wrong")
    assert choose() == "wrong" and not device
    backends.force("op", "missing")
    with pytest.raises(ValueError, match="'missing', which is none of: slow, fast"):
        choose()
    backends.force("op", None)
    assert choose() == "fast"


def test_nothing_is_measured_off_the_gpu_or_inside_a_graph(device, monkeypatch):
    assert choose(where=CPU) == "slow"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "slow" and not device and not backends.choices()


def test_short_memory_takes_the_first_and_keeps_nothing(device):
    def run(implementation):
        raise torch.OutOfMemoryError("no room")

    assert backends.choose("op", (1,), TABLE, tuple(TABLE), run, CUDA) == "slow" and not backends.choices()


def test_no_implementation_at_all_says_what_each_said(device):
    with pytest.raises(RuntimeError, match="refusing.*not this shape"):
        choose(unasked=("refusing", "refusing"))


def test_gluon_runs_unasked_only_where_it_has_passed(monkeypatch):
    for op, table in gemm8.BACKENDS.items():
        assert any(name.startswith("triton") for name in gemm8.unasked(op))
        monkeypatch.setattr(gemm8, "GLUON_PASSED", ())
        assert not any(name.startswith("gluon") for name in gemm8.unasked(op))
        monkeypatch.setattr(gemm8, "GLUON_PASSED", (gemm8.triton.__version__,))
        assert gemm8.unasked(op) == list(table)
        assert any(name.startswith("gluon") for name in gemm8.unasked(op))


@pytest.mark.parametrize(("rows", "same"), [((4096, 3968, 2064), True), ((4096, 2048), False), ((4096, 4095), False)])
def test_numbers_of_rows_that_change_with_every_call_share_a_choice(rows, same, monkeypatch):
    seen = set()
    monkeypatch.setattr(backends, "choose", lambda op, shape, *rest: seen.add((op, *shape)) or "nothing")
    monkeypatch.setattr(gemm8, "BACKENDS", {op: {"nothing": lambda *args: None} for op in gemm8.BACKENDS})
    for m in rows:
        gemm8.fp8_mm(*make("fp8_mm", Maker(0, torch.bfloat16, "cpu"), rows=m, n=384, k=256))
        grad, *operands = make("fp8_wgrad_", Maker(0, torch.bfloat16, "cpu"), rows=m, n=384, k=256)
        gemm8.fp8_wgrad_(grad, *operands)
    assert (len(seen) == 2) is same
