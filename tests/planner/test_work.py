"""Times of pieces: the forward slots of the published trace they were calibrated on, and the backward ones they were
not."""

from dataclasses import replace

import pytest
from plans import REPORT, constants, faster, model

from deepv3.arithmetic import attention_flops, block
from deepv3.planner.calibration import Value
from deepv3.planner.hardware import DEVICES
from deepv3.planner.work import Seconds, Workload, added

V3 = model("v3_671b")
ZERO = Value(0, 0, 0, "test")


def workload(precision="fp8", cal=REPORT, **changes) -> Workload:
    base = Workload(V3, DEVICES["h800"], cal, precision, "selective", 4096, 4096, 64)
    return replace(base, **changes)


# Milliseconds of a layer's slots in profile-data's train.json, H800, 112 multiprocessors (middle of their range)
@pytest.mark.parametrize("piece, slot", [("attention_forward", 4.4), ("ffn_forward", 4.75)])
def test_forward_slots_of_the_trace_are_met(piece, slot):
    assert getattr(workload().layer(True), piece).total() * 1e3 == pytest.approx(slot, rel=0.05)


@pytest.mark.parametrize("piece, slot", [("attention_input", 9.45), ("attention_weight", 2.4)])
def test_attentions_backward_slots_come_out_unfitted(piece, slot):
    assert getattr(workload().layer(True), piece).total() * 1e3 == pytest.approx(slot, rel=0.06)


def test_the_experts_backward_slots_come_out_unfitted():
    """Input and weight gradients share their quantisation kernels, which the trace counts in either: held together."""
    layer = workload().layer(True)
    assert (layer.ffn_input.total() + layer.ffn_weight.total()) * 1e3 == pytest.approx(5.2 + 4.95, rel=0.10)


def test_a_whole_layer_is_within_four_percent_of_the_trace():
    assert workload().layer(True).total().total() * 1e3 == pytest.approx(31.15, rel=0.04)


def test_attention_time_is_its_flops_over_its_rate():
    seconds = workload().layer(True).attention_forward["attention"]
    assert 4096 * attention_flops(V3, 4096) / seconds / 1e12 == pytest.approx(553, rel=0.01)


def test_gemm_time_of_a_bf16_layer_counts_every_matrix_once():
    cal = constants(bf16_dense=1.0, bf16_dense_wgrad=1.0, bf16_grouped=1.0, comm_sms=0.0)
    work = workload("bf16", cal, recompute="none", ep=4, tokens=10_000_000)  # rows enough that none waits for memory
    b = block(V3)
    used = b.attention - b.attention_norms + b.router + b.shared + 8 * b.expert
    flops = work.layer(True).total()["gemm_bf16"] * DEVICES["h800"].bf16
    assert flops == pytest.approx(6 * 10_000_000 * used, rel=2e-3)


def test_fp8_beats_bf16_and_leaves_router_head_and_eh_proj_to_it():
    assert workload().layer(True).total().total() < workload("bf16").layer(True).total().total()
    assert set(workload().head()) == {"gemm_bf16", "memory"} and set(added(workload().joint())) == {"gemm_bf16"}
    router = 3 * 2 * 4096 * 7168 * 256 / (DEVICES["h800"].bf16 * workload().share * REPORT.bf16_dense.value)
    assert workload().layer(True).total()["gemm_bf16"] == pytest.approx(router, rel=0.02)


def test_recompute_only_adds_to_backward():
    none, selective, full = (workload(recompute=r).layer(True) for r in ("none", "selective", "full"))
    assert none.attention_forward == selective.attention_forward == full.attention_forward
    assert none.attention_input.total() < selective.attention_input.total() < full.attention_input.total()
    assert full.ffn_input.total() > selective.ffn_input.total() == none.ffn_input.total()


@pytest.mark.parametrize("name", ["bf16", "fp8", "hbm"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_faster_device_never_slows_a_layer(name, precision):
    before, after = workload(precision), workload(precision, device=faster("h800", name))
    for moe in (False, True):
        assert after.layer(moe).total().total() <= before.layer(moe).total().total()


def test_the_sums_of_an_experts_weight_gradient_come_after_its_products():
    """64 experts on one device with 384 rows each, [2816, 2048], one H200 (docs/benchmarks.md, FP8, add): 1.139 ms."""
    m = replace(model("mini"), moe_intermediate_size=1408, num_experts_per_tok=6)
    work = replace(workload("fp8"), m=m, tokens=4096, ep=1, device=DEVICES["h200"], cal=constants(
        fp8_grouped_wgrad=0.40, hbm=0.88
    ))  # fmt: skip
    seconds = work.grouped(2048, 2816, "weight").total()
    assert seconds == pytest.approx(1.139e-3, rel=0.06)
    assert seconds > 64 * 2816 * 2048 * 8 / work.bandwidth * 1.4, "neither alone explains it"


def test_a_small_layer_waits_for_its_launches_and_a_large_one_does_not():
    small, large = replace(workload("bf16"), m=model("tiny"), tokens=1024, ep=1).layer(True), workload().layer(True)
    forward = small.attention_forward + small.ffn_forward
    assert forward.total() == pytest.approx(45 * REPORT.launch.value * 4.0 / 3.8)
    assert forward["host"] > 0.5 * forward.total() and large.total()["host"] == 0.0


def test_experts_called_one_by_one_cost_launches_that_one_grouped_kernel_does_not():
    """32 experts of a rank in FP8: 4 calls each forward and 6 backward; in BF16, which quantises nothing, 2 and 4."""
    cal = REPORT.changed({"expert_calls": Value(1, 1, 1, "test"), "launch": Value(1.0, 1.0, 1.0, "test")})
    for precision, calls in (("fp8", 10), ("bf16", 6)):
        one, other = (workload(precision, c, ep=8).layer(True).total() for c in (cal, replace(cal, expert_calls=ZERO)))
        assert one["host"] - other["host"] == pytest.approx(32 * calls * 4.0 / 3.8)


def test_the_host_goes_on_while_tokens_travel_and_a_faster_one_is_waited_for_less():
    cal = constants(launch=1e-3)
    waited = workload(cal=cal).layer(True).total()["host"]
    assert workload(cal=cal, exchange=2e-3).layer(True).total()["host"] == pytest.approx(waited - 4e-3)
    assert workload(cal=cal, device=faster("h800", "host")).layer(True).total()["host"] < 0.5 * waited


def test_seconds_add_class_by_class():
    assert added([Seconds({"a": 1.0, "b": 2.0}), Seconds({"b": 3.0})]) == {"a": 1.0, "b": 5.0}


def test_twice_the_exponentials_shorten_the_share_of_attention_that_they_bind():
    cal = constants(attention=0.5, attention_backward=0.5, softmax=0.4, softmax_backward=0.2)
    slow, fast = (
        workload(cal=cal, device=replace(DEVICES["gb200"], exponentials=number)).layer(True) for number in (1.0, 2.0)
    )
    assert fast.attention_forward["attention"] == pytest.approx(0.8 * slow.attention_forward["attention"])
    assert fast.attention_input["attention"] == pytest.approx(0.9 * slow.attention_input["attention"])
    assert DEVICES["gb300"].exponentials == DEVICES["b300"].exponentials == 2.0


def test_codes_of_attention_move_their_elements():
    plain, coded = (workload(cal=constants(attention_codes=bytes_)).layer(True) for bytes_ in (0.0, 4.0))
    moved = 4096 * 4.0 * 128 / (3350e9 * REPORT.hbm.value)
    forward, backward = (
        getattr(coded, name)["memory"] - getattr(plain, name)["memory"]
        for name in ("attention_forward", "attention_input")
    )
    assert forward == pytest.approx(moved * (2 * 192 + 128)) and backward == pytest.approx(moved * 128)


def test_fused_experts_drop_the_bytes_of_their_swiglu_only():
    plain, fused = (workload(cal=constants(fused_experts=value)) for value in (0, 1))
    routed = 4096 * 8 * V3.moe_intermediate_size
    assert plain.fewest_bytes(True)["experts"] - fused.fewest_bytes(True)["experts"] == pytest.approx(16 * routed)
    assert plain.fewest_bytes(True)["attention"] == fused.fewest_bytes(True)["attention"]
    assert plain.fewest_bytes(False) == fused.fewest_bytes(False)


def test_sums_of_bf16_gradients_move_half():
    sums = [workload(gradient_bytes=width).layer(True).ffn_weight.total() for width in (0, 2, 4)]
    assert sums[2] - sums[1] == pytest.approx(sums[1] - sums[0]) and sums[1] > sums[0]
