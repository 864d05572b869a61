"""Where gradients go: FP32 buffers, the queue, plain autograd; the same values each way."""

import pytest
import small_model as small
import torch

from deepv3.precision.wgrad import WeightGradQueue

RECOMPUTE = ("none", "selective", "full")


def _double(parameters):
    return {name: 2 * value for name, value in parameters.items()}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_main_grad_equals_plain_autograd_and_leaves_grad_empty(recompute):
    cfg = small.config(num_nextn_predict_layers=2)
    rows = small.tokens(cfg)
    plain, buffered = (small.build(cfg, recompute=recompute) for _ in range(2))
    small.use_main_grads(buffered)
    small.backward(plain, rows)
    small.backward(buffered, rows)
    expected = small.gradients(plain)
    for name, parameter in buffered.named_parameters():
        assert parameter.grad is None and parameter.grad_ready, name
        assert small.distance(parameter.main_grad, expected[name]) < 1e-6, name


@pytest.mark.parametrize("delayed", [False, True])
def test_main_grad_is_overwritten_by_the_first_micro_batch_and_added_to_by_the_next(delayed):
    cfg = small.config()
    queue = WeightGradQueue() if delayed else None
    model, once = small.build(cfg, queue=queue), small.build(cfg)
    small.use_main_grads(model)
    rows = small.tokens(cfg)
    small.backward(once, rows)
    expected = small.gradients(once)
    for _ in range(2):  # a second step starts by overwriting again
        for parameter in model.parameters():
            parameter.grad_ready = False
        for _ in range(2):
            small.backward(model, rows)
            if queue is not None:
                queue.flush()
        for name, gradient in _double(expected).items():
            assert small.distance(small.gradients(model)[name], gradient) < 1e-6, name


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("buffered", [False, True])
def test_delayed_weight_gradients_equal_immediate_ones(recompute, buffered):
    """Two micro-batches wait in one queue; bitwise, because the same GEMMs run in the same order."""
    cfg = small.config()
    queue = WeightGradQueue()
    now, later = small.build(cfg, recompute=recompute), small.build(cfg, recompute=recompute, queue=queue)
    if buffered:
        small.use_main_grads(now)
        small.use_main_grads(later)
    for seed in (3, 4):
        for model in (now, later):
            small.backward(model, small.tokens(cfg, seed=seed))
    waiting = later.layers[1].mlp.experts.down_proj.weight
    assert len(queue) > 0 and (not waiting.grad_ready if buffered else waiting.grad is None)
    queue.flush()
    assert len(queue) == 0
    expected = small.gradients(now)
    for name, gradient in small.gradients(later).items():
        assert torch.equal(gradient, expected[name]), name


def test_every_matrix_but_embedding_and_head_waits_in_the_queue():
    cfg = small.config()
    queue = WeightGradQueue()
    model = small.build(cfg, queue=queue)
    small.backward(model, small.tokens(cfg))
    waiting = {name for name, p in model.named_parameters() if p.grad is None}
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert waiting == matrices - {"embed_tokens.weight", "lm_head.weight"}


def test_embedding_and_head_collect_the_gradients_of_every_depth():
    """Main model and two depths write into one buffer each; the sum is what autograd makes of separate runs."""
    cfg = small.config(num_nextn_predict_layers=2)
    rows = small.tokens(cfg)
    model = small.build(cfg)
    small.use_main_grads(model)
    small.backward(model, rows, mtp_weight=0.7)
    shares = []
    for weight in (0.0, 0.7):
        plain = small.build(cfg)
        small.backward(plain, rows, mtp_weight=weight)
        shares.append(plain)
    for name in ("embed_tokens", "lm_head"):
        main_only, both = (getattr(plain, name).weight.grad for plain in shares)
        assert small.distance(getattr(model, name).weight.main_grad, both) < 1e-6
        assert small.distance(main_only, both) > 1e-2  # the depths do contribute


def test_bf16_weights_gather_gradients_in_fp32():
    """Many micro-batches: a BF16 sum would lose the small ones."""
    cfg = small.config(num_nextn_predict_layers=0, num_hidden_layers=2)
    model, one = small.build(cfg, dtype=torch.bfloat16), small.build(cfg, dtype=torch.bfloat16)
    small.use_main_grads(model)
    small.use_main_grads(one)
    rows = small.tokens(cfg, batch=1)
    small.backward(one, rows)
    for _ in range(300):
        small.backward(model, rows)
    for name, gradient in small.gradients(one).items():
        assert model.get_parameter(name).main_grad.dtype == torch.float32
        assert small.distance(small.gradients(model)[name], 300 * gradient) < 1e-4, name


def test_frozen_weights_get_no_gradient_and_hold_up_nobody():
    cfg = small.config()
    model, free = small.build(cfg), small.build(cfg)
    for name in ("layers.1.mlp.experts.gate_up_proj.weight", "layers.2.self_attn.o_proj.weight", "norm.weight"):
        model.get_parameter(name).requires_grad_(False)
    rows = small.tokens(cfg)
    small.backward(model, rows)
    small.backward(free, rows)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, free.get_parameter(name).grad), name
        else:
            assert parameter.grad is None
