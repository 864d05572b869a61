"""The whole model in FP8: with finer codes it is the BF16 model, and with its own codes it is as near as they allow."""

import dataclasses
import gc
from unittest import mock

import pytest
import small_model as small
import torch
from test_recipe import fp8

import deepv3.kernels as kernels
from deepv3.generate.decode import generate
from deepv3.kernels.reference import gather8, quantise
from deepv3.model.mla import attend, attend_packed
from deepv3.precision.recipe import recipe_of

# Balance is forced: otherwise near-ties send tokens elsewhere, and the comparison is of two other models.
CFG = small.config(
    hidden_size=128, intermediate_size=192, moe_intermediate_size=128, q_lora_rank=64, kv_lora_rank=48,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, initializer_range=0.08, force_balance=True,
)  # fmt: skip
ROWS = small.tokens(CFG, batch=2, seq_len=40)


def trained(precision: str, recompute: str = "selective", cfg=CFG, **precision_changes):
    """Objective and gradients of one micro-batch."""
    dtype = {"fp32": torch.float32}.get(precision, torch.bfloat16)
    recipe = recipe_of(fp8(cfg, **precision_changes)) if precision == "fp8" else None
    model = small.build(cfg, dtype=dtype, recompute=recompute, recipe=recipe)
    out = small.backward(model, ROWS)
    return out.objective.item(), {name: g.float() for name, g in small.gradients(model).items()}


@pytest.fixture(scope="module")
def exact():
    return trained("fp32")


def mean_distance(found: dict, expected: dict) -> float:
    return sum(small.distance(found[name], expected[name]) for name in expected) / len(expected)


def finer_codes():
    """Codes of 8 significant bits instead of 4, in the same blocks with the same scales."""

    def permute(codes, scales, token_of_slot):
        missing, tokens = token_of_slot < 0, token_of_slot.clamp(min=0)
        spread = quantise.row_scales(len(tokens), codes.shape[1], codes.device)
        spread.copy_(scales.index_select(0, tokens))
        return codes.index_select(0, tokens).masked_fill(missing[:, None], 0), spread

    stack = mock.patch.multiple(kernels, permute_fp8=permute), mock.patch.object(gather8, "permute_fp8", permute)
    return *stack, mock.patch.object(quantise, "to_codes", lambda scaled: scaled.bfloat16())


def test_with_finer_codes_it_is_the_bf16_model(exact):
    """Whatever is exchanged, forgotten or counted twice would stay wrong however fine the codes are."""
    first, second, third = finer_codes()
    with first, second, third:
        loss, gradients = trained("fp8")
    plain_loss, plain = trained("bf16")
    assert mean_distance(gradients, exact[1]) < 1.5 * mean_distance(plain, exact[1])
    assert abs(loss - exact[0]) < 2e-3 * exact[0] > abs(plain_loss - exact[0])


def test_loss_and_gradients_are_as_near_as_four_bits_allow(exact):
    """Four significant bits against eight: 16 times the rounding error of BF16, in the products' operands only."""
    loss, gradients = trained("fp8")
    plain = mean_distance(trained("bf16")[1], exact[1])
    assert abs(loss - exact[0]) < 5e-3 * exact[0]
    assert 3 * plain < mean_distance(gradients, exact[1]) < 16 * plain
    for name, gradient in gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact[1][name].flatten(), dim=0)
        assert cosine > 0.9, name


def test_gradients_do_not_depend_on_the_size_of_the_batch():
    """The objective is divided by the tokens of the global batch, 6e7 for V3: a power of two must go through unseen."""
    found = []
    for scale in (1.0, 2.0**-27):
        model = small.build(CFG, dtype=torch.bfloat16, recompute="selective", recipe=recipe_of(fp8(CFG)))
        small.use_main_grads(model)
        model(ROWS, scale / 80, 0.3).objective.backward()
        found.append({name: gradient / scale for name, gradient in small.gradients(model).items()})
    assert mean_distance(found[1], found[0]) < 1e-6


def test_recompute_gives_the_same_bits_and_all_of_it_nearly():
    """Under "full" no attention output is kept, so none is rounded to 12 bits."""
    loss, kept = trained("fp8", "none")
    assert trained("fp8", "selective")[0] == loss
    again, full = trained("fp8", "selective")[1], trained("fp8", "full")[1]
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert mean_distance(full, kept) < 0.2


def codes_alive() -> set[int]:
    """Addresses of FP8 tensors that Python holds."""
    held = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    return {tensor.data_ptr() for tensor in held if tensor.dtype == torch.float8_e4m3fn and tensor.numel()}


def test_full_recompute_keeps_block_inputs_only():
    """Autograd's saved tensors are activation checkpointing's to drop; nothing may hold codes beside them."""
    model = small.build(CFG, dtype=torch.bfloat16, recompute="full", recipe=recipe_of(fp8(CFG)))
    layout = model.layout(2, 40, torch.device("cpu"))
    with torch.no_grad():
        model(ROWS, 1 / 80, 0.3)  # makes the weights' codes
    gc.collect()
    before = codes_alive()
    x = torch.randn(80, CFG.hidden_size).bfloat16().requires_grad_()
    y, _ = model.block(1)(x, layout)
    gc.collect()
    assert codes_alive() <= before
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("changes", [{"break_even": 1e9}, {"recipe": "block_gradients"}])
def test_other_recipes_train_too_and_differ(changes, exact):
    loss, gradients = trained("fp8", **changes)
    plain = trained("fp8")[1]
    assert abs(loss - exact[0]) < 5e-3 * exact[0] and mean_distance(gradients, exact[1]) < 0.5
    assert any(not torch.equal(gradients[name], plain[name]) for name in plain)


def test_unusual_shapes_train():
    """No query latent, no shared expert, factors on the latents, widths below a block."""
    cfg = dataclasses.replace(
        CFG, q_lora_rank=None, n_shared_experts=0, latent_scale_q=0.5, latent_scale_kv=2.0, v_head_dim=16,
        moe_intermediate_size=16, first_k_dense_replace=0, num_nextn_predict_layers=2,
    )  # fmt: skip
    found, expected = trained("fp8", cfg=cfg), trained("fp32", cfg=cfg)
    assert abs(found[0] - expected[0]) < 5e-3 * expected[0]
    assert mean_distance(found[1], expected[1]) < 0.4


@pytest.mark.parametrize("width", [32, 16], ids=["equal head widths", "values padded"])
def test_attention_keeps_its_output_in_twelve_bits(width):
    q, k, v = (torch.randn(2, 24, 8, d).bfloat16().requires_grad_() for d in (32, 32, width))
    plain = attend(q, k, v, 0.2, None)
    kept = torch.autograd.grad(plain, (q, k, v), torch.ones_like(plain))
    out, packed = attend_packed(q, k, v, 0.2, None, None, pack=True)
    assert torch.equal(out, plain) and packed is not None
    rounded = packed().view_as(out)
    assert 1e-4 < small.distance(rounded.float(), out.detach().float()) < 2**-7
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(small.distance(a.float(), b.float()) < 1e-2 for a, b in zip(gradients, kept))
    assert not torch.equal(gradients[0], kept[0]), "backward did not read the packed output"


def test_a_model_in_fp8_validates_and_generates():
    model = small.build(CFG, dtype=torch.bfloat16, recipe=recipe_of(fp8(CFG)))
    with torch.no_grad():
        assert model(ROWS, 1 / 80, 0.3).objective.isfinite()
    out = generate(model, ROWS[:1, :5], max_new_tokens=4)
    first = model.logits(ROWS[:1, :5])[0, -1].argmax()
    assert out.shape == (1, 9) and out[0, 5] == first
