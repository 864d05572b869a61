"""The Gluon products' protocol and arithmetic, run as Python: see `gluon_on_cpu`."""

import gluon_on_cpu
import pytest
import torch
from gluon_on_cpu import Descriptor, OnCpu
from inputs import Maker
from inputs8 import make

import deepv3.kernels as kernels
from deepv3.kernels import gemm8
from deepv3.kernels.testing import relative_norm

gluon8 = pytest.importorskip("deepv3.kernels.gluon8", reason=f"Gluon of Triton {gemm8.GLUON_FOR}x")

PROGRAMS = 3
TILES = [
    gluon8.Tile(128, 4),
    gluon8.Tile(128, 2),
    gluon8.Tile(128, 1),
    gluon8.Tile(128, 3, True),
]  # fewer stages than steps and more
ENDS = {"first empty": [0, 128, 384], "last empty": [256, 384, 384], "all empty": [0, 0, 0], "full": [128, 128, 512]}


@pytest.fixture(autouse=True)
def kernel_on_cpu(monkeypatch) -> OnCpu:
    """Launches run the kernel as Python, three programs wide."""
    stand_in = OnCpu("mm_kernel", gluon8)
    monkeypatch.setattr(gluon8, "describe", Descriptor)
    monkeypatch.setattr(gluon8, "mm_kernel", stand_in)
    monkeypatch.setattr(gluon8, "multiprocessors", lambda device: PROGRAMS)
    return stand_in


def test_a_descriptor_is_made_once_per_address_and_shape_and_keeps_no_memory(monkeypatch):
    monkeypatch.undo()
    memory = torch.zeros(4, 256, 128)
    first = gluon8.matrix(memory[0], 128)
    assert gluon8.matrix(memory[0], 128) is first and not isinstance(first.base, torch.Tensor)
    assert first.base.data_ptr() == memory.data_ptr() and first.block_shape == [128, 128]
    others = [gluon8.matrix(memory[1], 128), gluon8.matrix(memory[0], 64), gluon8.matrix(memory[0][:128], 128)]
    others.append(gluon8.matrix(memory[0].view(torch.float8_e4m3fn), 128))
    assert all(other is not first for other in others) and others[3].layout != first.layout


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(300, 272, 272), (1, 16, 128), (128, 640, 1040)])
def test_product_of_any_shape(rows, n, k, tile):
    *operands, _ = make("fp8_mm", Maker(1, torch.float32), rows=rows, n=n, k=k)
    out = torch.full((rows, n), float("nan"))
    gluon8.launch_mm(out, *operands, None, tile)
    assert relative_norm(out, kernels.fp8_mm.__wrapped__(*operands, torch.float32)) <= 1e-6


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_product_of_uneven_experts(ends):
    *operands, offsets, _ = make("grouped_fp8_mm", Maker(2, torch.float32), ends=ends, rows=512, n=272, k=400)
    out = torch.full((512, 272), float("nan"))
    gluon8.launch_mm(out, *operands, offsets, TILES[0])
    assert relative_norm(out, kernels.grouped_fp8_mm.__wrapped__(*operands, offsets, torch.float32)) <= 1e-6
    assert (out[ends[-1] :] == 0).all()


ARRIVE = "            mbarrier.arrive(empty.index(stage), count=1)\n"
WAIT = "            part = warpgroup_mma_wait(0, deps=(part,))\n"
MISTAKES = {
    "the producer waits for a stage nobody has used": {"stage, phase = 0, 1": "stage, phase = 0, 0"},
    "one consumer keeps its stages": {ARRIVE: "            if HALF == 0:\n    " + ARRIVE},
    "fewer bytes are announced than come": {"(128 + N) * 128 + 128 * 4": "(128 + N) * 128"},
    "a stage is handed back before it is read": {ARRIVE: "", WAIT: ARRIVE + WAIT},
    "a tile is overwritten while it leaves": {"        tma.store_wait(0)\n        gl": "        gl"},
    "the phase never turns": {"phase ^ 1": "phase"},
    "nobody has the first turn": {"my_turn = 1 - HALF": "my_turn = 0"},
    "a turn is not handed on": {"turn.index(1 - HALF)": "turn.index(HALF)"},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_protocol_is_found(mistake, kernel_on_cpu, monkeypatch):
    """What the tests above would have missed if they passed for another reason."""
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 0.5)
    kernel = kernel_on_cpu
    assert all(any(old in source for source in kernel.sources.values()) for old in MISTAKES[mistake])
    kernel.edits, kernel.lag = MISTAKES[mistake], 0.01
    *operands, _ = make("fp8_mm", Maker(5, torch.float32), rows=512, n=256, k=512)
    out = torch.full((512, 256), float("nan"))
    expected = kernels.fp8_mm.__wrapped__(*operands, torch.float32)
    with pytest.raises(AssertionError):
        gluon8.launch_mm(out, *operands, None, gluon8.Tile(128, 2, turns="turn" in mistake))
        assert relative_norm(out, expected) <= 1e-6
