"""One block: its pieces, what it recomputes, and what it keeps."""

import gc
import weakref

import pytest
import small_model as small
import torch

from deepv3 import kernels
from deepv3.model import mla
from deepv3.model.dispatch import LocalDispatch


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_whole_block_is_the_composition_of_its_pieces(recompute):
    """Each piece's graph is cut from the others, as a pipeline cuts it, and walked backward on its own."""
    cfg = small.config()
    model = small.build(cfg, recompute=recompute)
    block, layout = model.layers[1], model.layout(2, 12, torch.device("cpu"))
    start = torch.randn(24, cfg.hidden_size, generator=torch.Generator().manual_seed(0))
    end = torch.randn(24, cfg.hidden_size, generator=torch.Generator().manual_seed(1))

    x = start.clone().requires_grad_()
    whole, routing = block(x, layout)
    (whole * end).sum().backward()
    expected, dx = small.gradients(block), x.grad
    for parameter in block.parameters():
        parameter.grad = None

    def cut(tensor):
        return tensor.detach().requires_grad_()

    x = start.clone().requires_grad_()
    x1, u, routing2 = block.attention(x, layout)
    x1_in, u_in, weights = cut(x1), cut(u.value), cut(routing2.weights)
    routing_in = routing2._replace(weights=weights)
    dispatched = block.dispatch(u._replace(value=u_in), routing_in)
    base = block.shared(u._replace(value=u_in), x1_in)
    rows_in, gates = cut(dispatched.rows.value), cut(dispatched.gates)
    arrived = dispatched._replace(rows=dispatched.rows._replace(value=rows_in), gates=gates)
    rows = block.experts(arrived)
    rows_back, base_in = cut(rows), cut(base)
    out = block.combine(rows_back, arrived, base_in)
    assert torch.equal(out, whole) and torch.equal(routing2.indices, routing.indices)

    (out * end).sum().backward()
    rows.backward(rows_back.grad)
    torch.autograd.backward([dispatched.rows.value, dispatched.gates], [rows_in.grad, gates.grad])
    base.backward(base_in.grad)
    torch.autograd.backward([x1, u.value, routing2.weights], [x1_in.grad, u_in.grad, weights.grad])
    torch.testing.assert_close(x.grad, dx)
    for name, gradient in small.gradients(block).items():
        torch.testing.assert_close(gradient, expected[name])


def test_dense_block_has_the_same_pieces():
    cfg = small.config()
    model = small.build(cfg)
    block, layout = model.layers[0], model.layout(2, 12, torch.device("cpu"))
    x, u, routing = block.attention(torch.randn(24, cfg.hidden_size), layout)
    dispatched = block.dispatch(u, routing)
    assert routing is None and dispatched is None and block.experts(dispatched) is None
    base = block.shared(u, x)
    assert block.combine(None, None, base) is base


def test_the_dispatcher_is_given_from_outside():
    class Counting(LocalDispatch):
        calls = 0

        def dispatch(self, u, routing):
            self.calls += 1
            return super().dispatch(u, routing)

    cfg = small.config()
    counting = Counting()
    small.build(cfg, dispatcher=counting).logits(small.tokens(cfg)[:, :9])
    assert counting.calls == 2


@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None}, {"latent_scale_kv": 1.5, "latent_scale_q": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_bit(recompute, dtype, change):
    cfg = small.config(**change)
    rows = small.tokens(cfg)
    kept, again = (small.build(cfg, recompute=mode, dtype=dtype) for mode in ("none", recompute))
    for expected, value in zip(small.backward(kept, rows), small.backward(again, rows)):
        assert torch.equal(expected, value)
    gradients = small.gradients(again)
    for name, expected in small.gradients(kept).items():
        assert torch.equal(expected, gradients[name]), name


def _tensors_alive_after_forward(recompute, monkeypatch):
    """Names of the tensors, by where they are made, that still exist between forward and backward."""
    watched = {}

    def watch(function, name, pick):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            # The storage, since views of a tensor keep it; the last call's are the last block's.
            watched[name] = weakref.ref(pick(out).untyped_storage())
            return out

        return call

    monkeypatch.setattr(kernels, "rmsnorm", watch(kernels.rmsnorm, "norm", lambda out: out[0]))
    monkeypatch.setattr(kernels, "swiglu", watch(kernels.swiglu, "swiglu", lambda out: out))
    monkeypatch.setattr(kernels, "permute", watch(kernels.permute, "rows", lambda out: out))
    monkeypatch.setattr(kernels, "assemble_key", watch(kernels.assemble_key, "keys", lambda out: out))
    cfg = small.config(num_nextn_predict_layers=0, num_hidden_layers=2)
    model = small.build(cfg, recompute=recompute)
    layout = model.layout(2, 12, torch.device("cpu"))
    x = torch.randn(24, cfg.hidden_size, requires_grad=True)
    out, routing = model.layers[1](x, layout)
    gc.collect()
    alive = {name for name, reference in watched.items() if reference() is not None}
    (out.sum() + routing.balance.sum()).backward()
    return alive


@pytest.mark.parametrize(("recompute", "kept"), [("none", {"norm", "keys"}), ("selective", set()), ("full", set())])
def test_what_is_recomputed_is_not_kept(recompute, kept, monkeypatch):
    assert _tensors_alive_after_forward(recompute, monkeypatch) == kept


def test_selective_recomputation_makes_each_tensor_once(monkeypatch):
    cfg = small.config(num_nextn_predict_layers=0)
    calls = {"norms": 0, "ups": 0}
    model = small.build(cfg, recompute="selective")
    norm, up = kernels.rmsnorm, mla.MLA._up

    def counted_norm(*args):
        calls["norms"] += 1
        return norm(*args)

    def counted_up(*args):
        calls["ups"] += 1
        return up(*args)

    monkeypatch.setattr(kernels, "rmsnorm", counted_norm)
    monkeypatch.setattr(mla.MLA, "_up", counted_up)
    out = model(small.tokens(cfg), 1 / 48, 0.3)
    forward = dict(calls)
    out.objective.backward()
    assert forward == {"norms": 4 * 3 + 1, "ups": 3}
    assert {name: calls[name] - forward[name] for name in calls} == {"norms": 4 * 3, "ups": 3}


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    cfg = small.config(num_nextn_predict_layers=0)
    model = small.build(cfg)
    for router in model.routers():
        router.e_score_correction_bias.zero_()
        router.e_score_correction_bias[[0, 1, 4, 5]] = 100.0
    rows = small.tokens(cfg)
    out = small.backward(model, rows)
    counts = torch.zeros(16, dtype=torch.int32)
    counts[[0, 1, 4, 5]] = 48
    assert torch.equal(out.counts, counts.expand(2, 16))
    unused = model.layers[1].mlp.experts.down_proj.weight.grad[[2, 3, 6, 15]]
    assert unused.abs().max() == 0 and torch.isfinite(out.objective)
