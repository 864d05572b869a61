"""Experts over ranks in FP8: what travels in which format, and that it is what one process computes."""

import dataclasses
from unittest import mock

import emulated
import expert_ranks
import pytest
import ranks
import small_model as small
import torch
import torch.distributed as dist
from test_recipe import fp8

from deepv3.arithmetic import wire_bytes
from deepv3.config.schema import Config
from deepv3.dist import init_distributed
from deepv3.model.node_exchange import make_dispatch
from deepv3.precision.recipe import recipe_of

WIDTH = 128
CFG = small.config(
    hidden_size=WIDTH, intermediate_size=64, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, num_nextn_predict_layers=0, num_hidden_layers=2,
    initializer_range=0.06,
)  # fmt: skip
RECIPE = recipe_of(fp8(CFG))

# Ranks add their part of a token's sum in BF16, one process adds all of it in FP32: the output differs by BF16's
# rounding. A dense weight's gradient is made on each rank of its own tokens, in column blocks that one process cuts
# elsewhere: two quantisations of the same values, each within the bound of a product. An expert meets the same codes in
# the same order, rows by rank, then token; over nodes in another order within the same block of 128.
BOUNDS = {"out": 5e-3, "x": 2e-2, "dense weight": 2**0.5 * emulated.BOUNDS["linear"]}


@dataclasses.dataclass(frozen=True)
class Case(expert_ranks.Case):
    dtype: str = "bf16"

    @property
    def cfg(self):
        return CFG


def build(case: Case, dispatcher=None):
    options = {"dtype": torch.bfloat16, "recompute": case.recompute, "dispatcher": dispatcher, "recipe": RECIPE}
    model = small.build(CFG, **options)
    for expert, bias in expert_ranks.BIASES[case.routing].items():
        model.routers()[0].e_score_correction_bias[expert] = bias
    return model


def on_rank(case: Case):
    """A rank's part, and (format, columns, elements) of every message of rows it sent, in order."""
    cfg = Config()
    cfg.parallel.ep_size = case.world
    grid = init_distributed(cfg)
    keep = case.recompute == "full"
    dispatcher = make_dispatch(grid, CFG.n_routed_experts, case.per_node, keep, RECIPE)
    x, end = (expert_ranks.share(case, grid.rank, expert_ranks.tokens(case, seed)) for seed in (0, 1))
    sent, true = [], dist.all_to_all_single

    def recorded(out, rows, *args, **kwargs):
        sent.append((str(rows.dtype).split(".")[1], rows.shape[1], rows.numel()))
        return true(out, rows, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", recorded):
        found = expert_ranks.forward_and_backward(build(case, dispatcher), x, end)
    return found, sent


CASES = [
    Case(2), Case(4, recompute="selective"), Case(2, recompute="full"), Case(4, per_node=2),
    Case(2, routing="one rank"), Case(4, routing="unused", recompute="full"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_over_ranks_compute_what_one_process_does(case):
    found = expert_ranks.join([part for part, _ in ranks.run(case.world, on_rank, case)])
    x, end = (expert_ranks.tokens(case, seed) for seed in (0, 1))
    expected = expert_ranks.forward_and_backward(build(case), x, end)
    assert torch.equal(found["counts"], expected["counts"]) and found.keys() == expected.keys()
    for name, value in found.items():
        if name != "counts":
            experts = 0.0 if case.per_node >= case.world else emulated.BOUNDS[torch.bfloat16]
            bound = experts if ".experts." in name else BOUNDS.get(name, BOUNDS["dense weight"])
            assert small.distance(value.double(), expected[name].double()) <= bound, name


def test_tokens_and_the_gradient_of_their_sums_travel_as_codes_and_the_rest_in_bf16():
    for _, sent in ranks.run(2, on_rank, Case(2)):
        rows = [message[:2] for message in sent if message[1] != 2 * CFG.num_experts_per_tok]  # gates and choices
        codes, scales, wide = ("uint8", WIDTH), ("float32", 1), ("bfloat16", WIDTH)
        forward, backward = [codes, scales, wide], [codes, scales, wide, ("float32", CFG.num_experts_per_tok)]
        assert rows == forward + backward
        bytes = wire_bytes(CFG, "fp8")
        assert (bytes.dispatch, bytes.combine) == (WIDTH + 4, 2 * WIDTH)


def test_an_experts_rows_are_filled_up_to_whole_blocks():
    model = build(Case(1, routing="unused"))
    block, x = model.block(1), expert_ranks.tokens(Case(2), 0).bfloat16()
    with torch.no_grad():
        _, u, routing = block.attention(x, expert_ranks.layout_of(model, x))
        dispatched = block.dispatch(u, routing)
    ends = dispatched.offsets.tolist()
    starts = [0, *ends[:-1]]
    filled = [-(-count // 128) * 128 for count in routing.counts.tolist()]
    assert [end - start for start, end in zip(starts, ends)] == filled and 0 in filled
    pad = routing.token_of_slot < 0
    assert not dispatched.rows.rows.codes[pad].float().any() and not dispatched.gates[pad].any()
