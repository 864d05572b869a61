"""Spans: own time without what is nested, several of a name add up, nothing is lost on errors."""

import itertools

import pytest
import torch

from deepv3.train import trace

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by itself one second per look, so that every figure is exact."""
    ticks = itertools.count()
    monkeypatch.setattr(trace.time, "perf_counter", lambda: float(next(ticks)))


def test_a_span_counts_its_own_time_without_those_inside_it(clock):
    spans = trace.Spans(CPU)
    with spans.span("compute"):  # marks 0 and 5: five seconds
        with spans.span("data"):  # 1 to 2
            pass
        with spans.span("comm_exposed"):  # 3 to 4
            pass
    assert spans.fields() == {"time_data": 1.0, "time_comm_exposed": 1.0, "time_compute": 3.0}


def test_hidden_communication_takes_nothing_from_what_hides_it(clock):
    spans = trace.Spans(CPU)
    with spans.span("compute"), spans.span("comm_hidden"):
        pass
    assert spans.fields() == {"time_comm_hidden": 1.0, "time_compute": 3.0}


def test_waiting_yields_every_item_and_times_each_wait(clock):
    spans = trace.Spans(CPU)
    assert list(spans.waiting("data", "abc")) == ["a", "b", "c"]
    assert spans.fields() == {"time_data": 4.0}  # three items and the end


def test_a_span_ends_where_its_block_fails_and_the_next_is_not_inside_it(clock):
    spans = trace.Spans(CPU)
    with pytest.raises(ValueError), spans.span("compute"):
        raise ValueError
    with spans.span("optimizer"):
        pass
    assert spans.fields() == {"time_compute": 1.0, "time_optimizer": 1.0}


def test_pauses_are_handed_over_once(clock):
    pauses = trace.Pauses()
    with pauses.span("checkpoint"):
        pass
    assert pauses.take() == {"time_checkpoint": 1.0}
    assert pauses.take() == {}


@pytest.mark.gpu
def test_marks_on_a_gpu_time_the_device_and_do_not_wait_for_it():
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    spans = trace.Spans(device)
    torch.cuda.synchronize()
    with spans.span("compute"):
        for _ in range(50):
            work = (work @ work).clamp(-1, 1)
        with spans.span("data"):
            pass
    assert not torch.cuda.current_stream().query(), "the host waited"
    torch.cuda.synchronize()
    fields = spans.fields()
    assert fields["time_compute"] > 10 * fields["time_data"]
