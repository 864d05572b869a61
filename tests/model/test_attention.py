"""Latent attention: what each token may see, which core runs, what is shared."""

import gc

import naive_model
import pytest
import small_model as small
import torch
from torch.nn.attention import SDPBackend

from deepv3.model import mla


def test_no_token_sees_a_later_one():
    cfg = small.config(num_nextn_predict_layers=0)
    model, rows = small.build(cfg), small.tokens(cfg)[:, :20]
    changed = rows.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % cfg.vocab_size
    before, after = model.logits(rows), model.logits(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=1e-4, atol=1e-5)  # GEMMs of other row counts
    assert not torch.allclose(before[:, 12], after[:, 12], atol=1e-2)


def _documents(rows):
    return (torch.arange(rows.shape[1]) >= 9).int().expand(rows.shape).contiguous()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_document_mask_lets_nothing_through(recompute):
    """Changing the first document changes no loss of the second; without the mask it does."""
    cfg = small.config(num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    model, rows = small.build(cfg, recompute=recompute), small.tokens(cfg, batch=1)
    changed = rows.clone()
    changed[:, :9] = (changed[:, :9] + 1) % cfg.vocab_size
    for masked in (True, False):
        documents = _documents(rows) if masked else None
        gradients = []
        for tokens in (rows, changed):
            model.zero_grad()
            layout = model.layout(1, 24, rows.device, documents)
            hidden, _ = model.trunk(tokens[:, :24], layout)
            hidden[10:].square().sum().backward()
            gradients.append(model.layers[2].self_attn.o_proj.weight.grad.clone())
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5) == masked


def test_masked_objective_and_gradients_equal_the_reports_formulas():
    cfg = small.config()
    model, rows = small.build(cfg, dtype=torch.float64), small.tokens(cfg)
    out = small.backward(model, rows, documents=_documents(rows))
    weights = naive_model.weights_of(model)
    objective, *_ = naive_model.objective(weights, rows, cfg, 0.3, _documents(rows))
    objective.backward()
    assert out.objective.item() == pytest.approx(objective.item(), rel=1e-10)
    for name, gradient in small.gradients(model).items():
        assert small.distance(gradient, weights[name].grad) < 1e-9, name


def test_rotary_key_is_one_per_token_taken_from_the_input_and_not_normed():
    """k_R doubles with its rows of the projection; a norm would undo that. All heads share it."""
    cfg = small.config()
    attention = small.build(cfg).layers[0].self_attn
    assert attention.kv_a_proj_with_mqa.weight.shape == (16 + 4, 32)
    assert attention.kv_a_layernorm.weight.shape == (16,) and attention.q_b_proj.weight.shape == (4 * (8 + 4), 12)
    seen = []
    original = mla.assemble_key

    def spy(kv, k_rope, *rest):
        seen.append((kv, k_rope))
        return original(kv, k_rope, *rest)

    layout = small.build(cfg).layout(1, 6, torch.device("cpu"))
    h = mla.Operand(torch.randn(6, 32))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(mla, "assemble_key", spy)
        attention(h, layout)
        attention.kv_a_proj_with_mqa.weight.mul_(2.0)
        attention(h, layout)
    torch.testing.assert_close(seen[1][1], 2 * seen[0][1])
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-4, atol=1e-4)
    assert seen[0][1].shape == (6, 4)


def test_cudnn_is_first_where_it_is_fast_and_never_where_it_cannot_be_trusted():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert mla._backends(torch.bfloat16, None)[0] == SDPBackend.CUDNN_ATTENTION
    assert SDPBackend.CUDNN_ATTENTION not in mla._backends(torch.float32, None)
    assert SDPBackend.CUDNN_ATTENTION not in mla._backends(torch.bfloat16, mask)
    torch.use_deterministic_algorithms(True)
    try:
        assert SDPBackend.CUDNN_ATTENTION not in mla._backends(torch.bfloat16, None)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("again", [False, True])
def test_cudnn_serves_the_head_dims_of_v3_and_agrees_with_the_plain_formula(again):
    """Strided values, as the model passes them; gradients within BF16's rounding of the FP32 formula's."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(1, 256, 4, 192, device="cuda", generator=generator) for _ in range(2))
    kv = torch.randn(1, 256, 4, 256, device="cuda", generator=generator)
    leaves = [tensor.bfloat16().requires_grad_() for tensor in (q, k, kv)]
    made = [tensor * 1 for tensor in leaves]
    remade = mla.Remade(lambda: (leaves[0] * 1, leaves[1] * 1, (leaves[2] * 1)[..., 128:])) if again else None
    mla._backends, saved = (lambda *_: [SDPBackend.CUDNN_ATTENTION]), mla._backends
    try:
        out = mla.attend(made[0], made[1], made[2][..., 128:], 192**-0.5, None, remade)
    finally:
        mla._backends = saved
    out.float().square().sum().backward()
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    scores = torch.einsum("bshd,bthd->bhst", wide[0], wide[1]) * 192**-0.5
    scores = scores.masked_fill(~torch.ones(256, 256, dtype=torch.bool, device="cuda").tril(), float("-inf"))
    expected = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), wide[2][..., 128:])
    expected.square().sum().backward()
    assert small.distance(out.float(), expected) < 1e-2
    for leaf, reference in zip(leaves, wide):
        assert small.distance(leaf.grad.float(), reference.grad) < 2e-2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_leaves_no_tensor_for_the_garbage_collector(recompute):
    """On a GPU, what waits for a collection is memory that the next micro-batch lacks."""
    cfg = small.config()
    model, rows = small.build(cfg, recompute=recompute), small.tokens(cfg)
    small.backward(model, rows)
    gc.collect()
    gc.disable()
    try:
        before = _tensors()
        small.backward(model, rows)
        assert _tensors() == before
    finally:
        gc.enable()


def _tensors() -> int:
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
