"""Bytes per rank: states as derived from the report, peaks of the schedules, and that more work never needs less."""

from dataclasses import replace

import pytest
from plans import REPORT, constants, model, v3

from deepv3.arithmetic import activation_bytes, parameters
from deepv3.planner.hardware import GB, GIB
from deepv3.planner.memory import Memory, fullest, misfit

STATES = ("weights", "gradients", "master", "moments")
V3 = model("v3_671b")


def of(**changes):
    return Memory(v3(**changes), REPORT).ranks()


def test_a_layer_keeps_the_derived_bytes_per_token():
    kept = activation_bytes(V3, "fp8", "selective", moe=True)
    assert sum(kept.values()) == 156_768
    assert kept["residual stream"] == 2 * 14_336 and kept["attention output"] == 25_088


def test_bf16_without_recompute_keeps_about_three_times_as_much():
    whole = sum(activation_bytes(V3, "bf16", "none", moe=True).values())
    assert whole * 4096 * 3.875 * 17 / GB == pytest.approx(122, rel=0.10)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("moe", [False, True])
def test_more_recompute_keeps_less(precision, moe):
    none, selective, full = (
        sum(activation_bytes(V3, precision, r, moe).values()) for r in ("none", "selective", "full")
    )
    assert full < selective < none


def test_states_of_the_reports_ranks():
    """22-25 GB on middle ranks, 33-36 GB where embedding, head and MTP live (derived: 8.5 of the specification)."""
    sums = [sum(rank.parts[name] for name in STATES) / GB for rank in of()]
    assert all(22 <= size <= 25 for size in sums[1:15])
    assert all(30 <= size <= 36 for size in (sums[0], sums[15]))


def test_the_report_fits_in_80_gigabytes_and_only_with_its_savings():
    assert misfit(of(), v3()) == ""
    for change in ({"precision": "bf16"}, {"recompute": "none"}):
        assert "GiB" in misfit(of(**change), v3(**change))


def test_every_parameter_is_held_as_often_as_the_schedule_says():
    count = parameters(V3)
    for schedule, pp, copies in (("dualpipe", 16, 2), ("dualpipev", 8, 1), ("1f1b", 16, 1)):
        layout = v3(schedule=schedule, pp=pp, ep=1)
        held = sum(rank.parameters for rank in Memory(layout, REPORT).ranks())
        second = count.embedding if schedule == "1f1b" else 0  # MTP embeds on the last rank too
        assert held == copies * count.stored + second


def test_masters_and_moments_shard_over_all_ranks_that_hold_a_weight():
    layout = v3()
    whole = sum(rank.parts["master"] for rank in Memory(layout, REPORT).ranks()) * layout.dp
    assert whole == pytest.approx(4.0 * parameters(V3).stored, rel=1e-6)


@pytest.mark.parametrize(
    "schedule, ranks, peak", [("1f1b", 8, 8), ("zb1p", 8, 8), ("dualpipe", 8, 9), ("dualpipev", 4, 9)]
)
def test_peaks_are_those_of_the_schedules(schedule, ranks, peak):
    assert max(sum(live) for moments in fullest(schedule, ranks, 2 * ranks + 2) for live in moments) == peak


@pytest.mark.parametrize("schedule, more", [("interleaved", 0), ("interleaved_pairs", 1)])
def test_peaks_of_interleaved_stages_are_the_formula_and_do_not_grow(schedule, more):
    moments = fullest(schedule, 4, 8, 4)
    assert max(sum(live) for rank in moments for live in rank) == 2 * 3 + 3 * 4 + 1 + more
    assert moments == fullest(schedule, 4, 40, 4)


def test_longer_steps_keep_no_more():
    for schedule in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        assert fullest(schedule, 4, 10) == fullest(schedule, 4, 40)


@pytest.mark.parametrize(
    "field, values", [("micro", (1, 2, 4)), ("seq_len", (1024, 4096, 8192)), ("loss_chunk", (512, 4096))]
)
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_memory_never_shrinks_when_a_micro_batch_grows(field, values, schedule):
    totals = [[rank.total for rank in of(schedule=schedule, **{field: value})] for value in values]
    for less, more in zip(totals, totals[1:]):
        assert all(a <= b for a, b in zip(less, more))


def test_memory_never_shrinks_when_the_batch_grows():
    totals = [max(rank.total for rank in of(batch=128 * count)) for count in (2, 8, 16, 24, 32, 64, 120, 240)]
    assert totals == sorted(totals)


def test_more_experts_per_rank_and_fewer_data_ranks_need_more():
    assert of(ep=32)[1].total > of(ep=64)[1].total
    small = replace(v3().cluster, count=1024)
    assert of(cluster=small)[1].parts["moments"] == pytest.approx(2 * of()[1].parts["moments"])


def test_ranks_that_share_memory_hold_their_slots_throughout():
    apart, together = (of(ep=8, shares_memory=shared)[0].parts["dispatch"] for shared in (False, True))
    assert together - apart == 2 * 8 * 4096 * (7168 * 2 + 320)  # scales, gates and choices take 288 bytes, filled up


def test_fp32_weights_are_their_own_masters():
    parts = of(precision="fp32")[3].parts
    assert parts["master"] == 0.0 and parts["weights"] == parts["gradients"]


def test_what_does_not_fit_is_named_with_its_knob():
    layout = v3(micro=4)
    text = misfit(Memory(layout, REPORT).ranks(), layout)
    assert "h800 has 79.6" in text and "activations" in text and "train.micro_batch_size" in text


def test_workspace_is_a_constant_with_a_range():
    lean = Memory(v3(), constants(workspace=0.0)).rank(0).parts["workspace"]
    assert Memory(v3(), REPORT).rank(0).parts["workspace"] - lean == pytest.approx(REPORT.workspace.value)
    assert lean / GIB > 0.1
