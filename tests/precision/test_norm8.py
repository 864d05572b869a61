"""A norm's FP8 result: the codes are those of its value, made in forward or again in backward."""

import pytest
import torch
from emulated import normal
from test_linear8 import recipe

import deepv3.kernels as kernels
from deepv3.model.layers import RMSNorm
from deepv3.precision.formats import TILES, TILES_POW2
from deepv3.precision.linear import Linear, Place

TOKENS, WIDTH = 130, 144
PLACE = Place(dtype=torch.bfloat16, recipe=recipe())


def norm(feeds: tuple[str, ...], remake: bool = False) -> RMSNorm:
    module = RMSNorm(WIDTH, 1e-6, remake, PLACE, feeds)
    module.weight.data.copy_(1 + normal(WIDTH, seed=7, scale=0.1))
    return module


def linear(seed: int) -> Linear:
    module = Linear(WIDTH, 32, PLACE, "q_a_proj")
    module.weight.data.copy_(normal(32, WIDTH, seed=seed, scale=0.1))
    return module


def test_a_norm_makes_what_its_readers_multiply_in():
    assert norm(()).fp8 is None and norm(("eh_proj",)).fp8 is None
    assert norm(("q_a_proj", "kv_a_proj_with_mqa")).fp8 == (TILES, False)
    assert norm(("gate", "gate_up_proj")).fp8 == (TILES_POW2, True)


@pytest.mark.parametrize("remake", [False, True])
@pytest.mark.parametrize("feeds", [("gate_up_proj",), ("gate", "gate_up_proj")])
def test_codes_are_those_of_the_norms_value(feeds, remake):
    module, x, residual = norm(feeds, remake), normal(TOKENS, WIDTH).requires_grad_(), normal(TOKENS, WIDTH, seed=1)
    operand, stream = module.with_stream(x, residual)
    plain = RMSNorm(WIDTH, 1e-6, remake, Place(dtype=torch.bfloat16))
    plain.weight.data.copy_(module.weight)
    value, summed = plain.with_stream(x, residual)
    assert torch.equal(stream, summed)
    expected = kernels.quantise_rows(value.value.detach(), "gate" in feeds)
    assert all(torch.equal(a, b) for a, b in zip(operand.rows, expected))
    assert torch.equal(operand.value, value.value) if "gate" in feeds else operand.value.isnan().all()


def test_a_value_that_only_codes_stand_for_takes_no_memory_and_cannot_be_mistaken_for_numbers():
    operand = norm(("q_b_proj",)).operand(normal(TOKENS, WIDTH).requires_grad_())
    assert operand.value.untyped_storage().nbytes() == 2 and operand.value.isnan().all()


def test_without_gradients_the_value_is_there():
    """Generation's cache of latents reads it."""
    with torch.no_grad():
        operand = norm(("kv_b_proj",)).operand(normal(TOKENS, WIDTH))
    assert operand.value.isfinite().all() and operand.rows is not None


def through(remake: bool) -> list[torch.Tensor]:
    """All gradients of two linear maps behind one norm."""
    module, first, second = norm(("q_a_proj", "kv_a_proj_with_mqa"), remake), linear(1), linear(2)
    x = normal(TOKENS, WIDTH).requires_grad_()
    operand, stream = module.with_stream(x)
    out = first(operand) * 2 + second(operand)
    torch.autograd.backward((out, stream), (normal(TOKENS, 32, seed=3), normal(TOKENS, WIDTH, seed=4)))
    return [x.grad, module.weight.grad, first.weight.grad, second.weight.grad]


def test_columns_made_again_in_backward_are_the_kept_ones_bit_for_bit():
    assert all(torch.equal(a, b) for a, b in zip(through(True), through(False)))


def test_the_columns_of_two_readers_are_made_once(monkeypatch):
    made, true = [], kernels.rmsnorm_fp8_columns
    monkeypatch.setattr(kernels, "rmsnorm_fp8_columns", lambda *args: (made.append(1), true(*args))[1])
    through(True)
    assert made == [1]


def test_a_factor_on_the_norm_is_in_the_codes():
    module = norm(("q_b_proj",))
    x = normal(TOKENS, WIDTH)
    found = linear(1)(module.operand(x, 0.5))
    plain = kernels.rmsnorm(x, module.weight.detach(), 1e-6)[0] * 0.5
    assert torch.equal(found, linear(1)(plain))
