"""Frequencies, tables and rotations (V3 2.1.1, 4.3)."""

import math

import pytest
import torch

from deepv3.config.schema import ModelConfig, RopeScaling
from deepv3.model.rope import RotaryTables, assemble_key, inverse_frequencies, rotate_query, softmax_scale


def test_plain_frequencies_are_powers_of_theta():
    expected = torch.tensor([10000.0 ** (-2 * j / 64) for j in range(32)])
    torch.testing.assert_close(inverse_frequencies(64, 10000.0, None), expected)


def test_yarn_of_v3_keeps_pairs_to_10_and_divides_pairs_from_23_by_40():
    plain, yarn = inverse_frequencies(64, 10000.0, None), inverse_frequencies(64, 10000.0, RopeScaling())
    ratio = plain / yarn
    assert torch.allclose(ratio[:11], torch.ones(11)) and torch.allclose(ratio[23:], torch.full((9,), 40.0))
    assert (ratio[11:23] > 1.001).all() and (ratio[11:23] < 39.99).all() and (ratio.diff()[10:23] > 0).all()


def test_softmax_scale_of_v3():
    assert softmax_scale(ModelConfig()) == pytest.approx(192**-0.5)
    extended = softmax_scale(ModelConfig(rope_scaling=RopeScaling()))
    assert extended == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert extended * 192**0.5 == pytest.approx(1.8739, abs=1e-4)


def test_positions_restart_in_every_sequence_and_tables_are_built_once():
    tables = RotaryTables(ModelConfig())
    cos, sin = tables(2, 5, torch.device("cpu"))
    assert cos.shape == (10, 32) and torch.equal(cos[:5], cos[5:]) and torch.equal(sin[0], torch.zeros(32))
    assert tables(2, 5, torch.device("cpu"))[0] is cos
    assert tables(1, 7, torch.device("cpu"))[0].shape == (7, 32)


def test_scores_depend_on_the_distance_alone():
    """The rotated parts of equal queries and keys give the same product at equal distance; the rest is untouched."""
    torch.manual_seed(0)
    cfg = ModelConfig(qk_rope_head_dim=8)
    cos, sin = RotaryTables(cfg)(1, 9, torch.device("cpu"))
    query, key = torch.randn(1, 2 * (4 + 8)).repeat(9, 1), torch.randn(1, 8).repeat(9, 1)
    kv = torch.randn(9, 2 * (4 + 6))
    before = query.clone()
    q = rotate_query(query.clone(), 2, cos, sin).view(9, 2, 12)
    k, v = assemble_key(kv, key, 2, 4, cos, sin)
    assert torch.equal(q[..., :4], before.view(9, 2, 12)[..., :4]) and torch.equal(
        k[..., :4], kv.view(9, 2, 10)[..., :4]
    )
    assert torch.equal(v, kv.view(9, 2, 10)[..., 4:]) and torch.equal(k[:, 0, 4:], k[:, 1, 4:])
    scores = torch.einsum("shd,thd->hst", q[..., 4:], k[..., 4:])
    for distance in range(1, 8):
        along = scores.diagonal(-distance, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), rtol=1e-4, atol=1e-5)


def test_gradients_of_rotation_and_assembly():
    torch.manual_seed(0)
    cos, sin = (table.double() for table in RotaryTables(ModelConfig(qk_rope_head_dim=4))(1, 3, torch.device("cpu")))
    q = torch.randn(3, 2 * 7, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(3, 2 * 5, dtype=torch.float64, requires_grad=True)
    k_rope = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: rotate_query(q * 1, 2, cos, sin), q)
    assert torch.autograd.gradcheck(lambda kv, k: assemble_key(kv * 1, k, 2, 3, cos, sin), (kv, k_rope))
