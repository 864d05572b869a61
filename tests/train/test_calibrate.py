"""The rows that the bench measures are rows that the planner reads."""

import itertools

import pytest
import torch

from deepv3.config.compose import compose
from deepv3.planner.calibration import BUILT_IN
from deepv3.planner.hardware import DEVICES
from deepv3.planner.measured import calibrate
from deepv3.train import calibrate as bench


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(bench, "UPDATE", 1 << 10)
    cfg = compose(["+config=tiny", "data.seq_len=64", "train.micro_batch_size=2"])
    calls = itertools.count(1)

    def clock(call) -> float:
        call()  # every call must run
        return next(calls) * 1e-6

    return list(bench.Bench(cfg, torch.device("cpu"), clock).rows(fp8=True)), cfg


def test_every_row_is_read_and_every_product_is_there(rows):
    found, _ = rows
    device = DEVICES["h200"]
    changed = calibrate(found, device, BUILT_IN["report"], "here").constants()
    was = BUILT_IN["report"].constants()
    names = {"hbm", "update_bytes", "attention", "attention_backward", "bf16_dense", "bf16_grouped", "fp8_dense"}
    names |= {"bf16_dense_wgrad", "fp8_grouped", "fp8_dense_wgrad", "fp8_grouped_wgrad"}
    assert {name for name in was if changed[name] != was[name]} == names


def test_flops_are_those_of_the_shapes(rows):
    found, cfg = rows
    m, tokens = cfg.model, 128
    dense = [row for row in found if row["kind"] == "gemm" and (row["format"], row["shape"]) == ("bf16", "dense")]
    first = 2 * tokens * m.hidden_size * (m.q_lora_rank or 0)
    assert dense[0]["flops"] == first and {row["pass"] for row in dense} == {"forward", "input", "weight"}
    attention = next(row for row in found if row["kind"] == "attention")
    qk = m.qk_nope_head_dim + m.qk_rope_head_dim
    assert attention["flops"] == 2 * m.num_attention_heads * 64**2 * (qk + m.v_head_dim)
