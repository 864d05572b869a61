"""The hand-written backwards among the references against autograd and gradcheck, in FP64."""

import pytest
import torch
from inputs import Maker
from torch.autograd import grad, gradcheck

import deepv3.kernels as kernels


def double(*shape: int) -> torch.Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


class Paired(torch.autograd.Function):
    """A forward and its backward, given as plain functions, for gradcheck."""

    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        ctx.backward_of, ctx.saved = backward, inputs
        return forward(*inputs)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *ctx.backward_of(gradients, *ctx.saved)


@pytest.mark.parametrize("residual", [False, True])
def test_rmsnorm_backward_is_the_derivative_of_rmsnorm(residual):
    x, r, weight = double(5, 12), double(5, 13)[:, :12].detach().requires_grad_(), double(12)
    y, rstd, summed = kernels.rmsnorm(x, weight, 1e-5, r if residual else None)
    dy, dsummed = double(5, 12).detach(), double(7, 12)[:5].detach()
    objective = (y * dy).sum() + (summed * dsummed).sum()
    dx, dweight = kernels.rmsnorm_backward(dy, summed.detach(), weight, rstd, dsummed)
    for wanted in grad(objective, (x, r) if residual else (x,), retain_graph=True):
        assert close(dx, wanted)
    assert close(dweight, grad(objective, weight)[0])


def test_norm_is_taken_of_the_rounded_sum():
    x, residual = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    y, rstd, summed = kernels.rmsnorm(x, torch.ones(64), 1e-6, residual)
    again, rstd_again, same = kernels.rmsnorm(summed, torch.ones(64), 1e-6)
    assert torch.equal(y, again) and torch.equal(rstd, rstd_again) and same is summed
    assert y.dtype == torch.bfloat16 and rstd.dtype == torch.float32


def test_rope_is_multiplication_of_complex_pairs_and_its_inverse_is_its_backward():
    angle = torch.randn(6, 4, dtype=torch.float64)
    q = double(6, 3, 13)
    rotated = kernels.rope_query_(q.detach().clone(), angle.cos(), angle.sin())
    pairs = torch.view_as_complex(q.detach()[..., 5:].reshape(6, 3, 4, 2).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)
    assert close(rotated, torch.cat((q.detach()[..., :5], turned), dim=-1))

    def forward(q):
        return kernels.rope_query_(q.clone(), angle.cos(), angle.sin())

    def backward(gradients, q):
        return (kernels.rope_query_(gradients[0].clone(), angle.cos(), angle.sin(), inverse=True),)

    assert gradcheck(lambda q: Paired.apply(forward, backward, q), (q,))


def test_assemble_key_backward_is_the_derivative_of_assemble_key():
    angle = torch.randn(4, 3, dtype=torch.float64)

    def forward(kv, k_rope):
        return kernels.assemble_key(kv, k_rope, angle.cos(), angle.sin(), 5), kv[..., 5:].clone()

    def backward(gradients, kv, k_rope):
        return kernels.assemble_key_backward(*gradients, angle.cos(), angle.sin())

    assert gradcheck(lambda *inputs: Paired.apply(forward, backward, *inputs), (double(4, 2, 9), double(4, 6)))


def test_router_backward_is_the_derivative_through_the_weights_alone():
    logits = double(7, 16)
    bias = torch.randn(16) * 0.05
    indices, weights = kernels.router_topk(logits, bias, 4, 4, 2, 2.5)
    dweights = double(7, 4).detach()
    ours = kernels.router_topk_backward(dweights, logits.detach(), indices, 2.5)
    assert close(ours, grad(weights, logits, dweights)[0])
    assert (ours != 0).sum() == indices.numel()


def test_balance_loss_backward_is_the_derivative_of_balance_loss():
    def forward(logits):
        return kernels.balance_loss(logits, 3, 5)

    def backward(gradients, logits):
        return (kernels.balance_loss_backward(gradients[0], logits, 3, 5),)

    assert gradcheck(lambda logits: Paired.apply(forward, backward, logits), (double(10, 8),))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_backward_is_the_derivative_of_swiglu(weighted):
    h, weight = double(6, 10), double(6) if weighted else None
    y = kernels.swiglu(h, weight)
    dy = double(6, 5).detach()
    dh, dweight, again = kernels.swiglu_backward(dy, h.detach(), weight, want_output=True)
    assert close(dh, grad(y, h, dy, retain_graph=True)[0]) and torch.equal(again, y)
    assert (dweight is None) is (not weighted)
    if weighted:
        assert close(dweight, grad(y, weight, dy)[0])
    assert kernels.swiglu_backward(dy, h.detach(), weight)[2] is None


def test_cross_entropy_gradient_replaces_the_logits():
    logits = double(6, 9)
    labels = torch.tensor([0, 8, -100, 3, 3, -100])
    loss = kernels.cross_entropy(logits, labels)
    overwritten = logits.detach().clone()
    assert close(kernels.cross_entropy_(overwritten, labels, 0.25), loss.detach())
    assert close(overwritten, grad(0.25 * loss.sum(), logits)[0])
    assert (overwritten[labels == -100] == 0).all()


def test_permute_and_unpermute_are_each_others_backward():
    indices = Maker(0, torch.float32).choices(7, 6, 3)
    slots, tokens, _, _ = kernels.routing_tables(indices, 6)
    x, rows, base = double(7, 4), double(21, 4), double(7, 4)
    assert gradcheck(
        lambda x: Paired.apply(lambda x: kernels.permute(x, tokens), lambda g, x: (kernels.unpermute(g[0], slots),), x),
        (x,),
    )
    assert gradcheck(
        lambda rows, base: Paired.apply(
            lambda rows, base: kernels.unpermute(rows, slots, base),
            lambda g, rows, base: (kernels.permute(g[0], tokens), g[0]),
            rows,
            base,
        ),
        (rows, base),
    )


def test_grouped_products_are_each_others_gradients():
    rows, weight, offsets = double(11, 5), double(4, 6, 5), torch.tensor([3, 3, 10, 11], dtype=torch.int32)
    dy = double(11, 6).detach()
    ends = [0, *offsets.tolist()]
    y = torch.cat([rows[a:b] @ weight[g].t() for g, (a, b) in enumerate(zip(ends, ends[1:]))])
    assert close(kernels.grouped_mm(rows.detach(), weight.detach(), offsets), y.detach())
    drows, dweight = grad(y, (rows, weight), dy)
    assert close(kernels.grouped_mm_t(dy, weight.detach(), offsets), drows)
    buffer = torch.full_like(dweight, float("nan"))
    kernels.grouped_wgrad_(buffer, dy, rows.detach(), offsets, False)
    assert close(buffer, dweight) and (buffer[1] == 0).all()
    kernels.grouped_wgrad_(buffer, dy, rows.detach(), offsets, True)
    assert close(buffer, 2 * dweight)
