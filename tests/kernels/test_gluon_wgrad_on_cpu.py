"""The Gluon weight gradients: protocol and arithmetic, run as Python (`gluon_on_cpu`), and machine code (`sass`)."""

import gluon_on_cpu
import pytest
import torch
from gluon_on_cpu import Descriptor, OnCpu
from inputs import Maker
from inputs8 import make
from sass import building

import deepv3.kernels as kernels
from deepv3.kernels import gemm8
from deepv3.kernels.testing import relative_norm

gluon8 = pytest.importorskip("deepv3.kernels.gluon8", reason=f"Gluon of Triton {gemm8.GLUON_FOR}x")
gluon8_wgrad = pytest.importorskip("deepv3.kernels.gluon8_wgrad", reason=f"Gluon of Triton {gemm8.GLUON_FOR}x")

WgradTile = gluon8_wgrad.WgradTile
TILES = gluon8_wgrad.WGRAD_TILES
# Stages fewer than steps; chunks one by one, a rest of one, and none.
FEW = [WgradTile(2, 2, 1), WgradTile(3, 2, 3), WgradTile(2, 2, 0)]
ENDS = {"first empty": [0, 128, 384], "last empty": [256, 384, 384], "all empty": [0, 0, 0], "full": [128, 128, 512]}


@pytest.fixture
def kernel_on_cpu(monkeypatch) -> OnCpu:
    """Launches run the kernel as Python, three programs wide: of six tiles, each has two and begins amid the first."""
    stand_in = OnCpu("wgrad_kernel", gluon8, gluon8_wgrad)
    for module in (gluon8, gluon8_wgrad):
        monkeypatch.setattr(module, "describe", Descriptor)
    monkeypatch.setattr(gluon8_wgrad, "wgrad_kernel", stand_in)
    monkeypatch.setattr(gluon8_wgrad, "multiprocessors", lambda device: 3)
    return stand_in


def gradients(op: str, tile, accumulate: bool, seed: int, **shape) -> tuple[torch.Tensor, torch.Tensor]:
    """(the tile's, the reference's); what is not written stays NaN when storing."""
    grad, *operands, _ = make(op, Maker(seed, torch.float32), **shape)
    grad = grad if accumulate else torch.full_like(grad, float("nan"))
    expected = grad.clone()
    getattr(kernels, op).__wrapped__(expected, *operands, accumulate)
    offsets = operands[4] if op.startswith("grouped") else None
    gluon8_wgrad.launch_wgrad(grad, *operands[:4], offsets, accumulate, tile)
    return grad, expected


@pytest.mark.parametrize("tile", TILES + FEW, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(700, 272, 400), (1, 16, 128), (128, 448, 48)])
def test_weight_gradient_of_any_shape(rows, n, k, accumulate, tile, kernel_on_cpu):
    grad, expected = gradients("fp8_wgrad_", tile, accumulate, 3, rows=rows, n=n, k=k)
    assert relative_norm(grad, expected) <= 1e-6


@pytest.mark.parametrize("tile", [TILES[0], TILES[-1], FEW[0]], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_weight_gradient_of_uneven_experts(ends, accumulate, tile, kernel_on_cpu):
    """144 rows: a group's last tile ends amid a consumer's rows, and the next group's begin right behind."""
    grad, expected = gradients("grouped_fp8_wgrad_", tile, accumulate, 4, ends=ends, rows=512, n=144, k=272)
    assert relative_norm(grad, expected) <= 1e-6


@pytest.mark.parametrize("tile", [TILES[0], FEW[0], TILES[-1]], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("programs", [2, 5, 12])
@pytest.mark.parametrize("rows", [128, 300, 1100])
def test_weight_gradient_wherever_programs_begin(rows, programs, accumulate, tile, kernel_on_cpu, monkeypatch):
    """1, 3 and 9 steps; more and fewer programs than steps; programs with one tile and with several."""
    monkeypatch.setattr(gluon8_wgrad, "multiprocessors", lambda device: programs)
    grad, expected = gradients("fp8_wgrad_", tile, accumulate, 6, rows=rows, n=400, k=400)
    assert relative_norm(grad, expected) <= 1e-6


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, int, list[int]]]:
    """What programs copy, store and add, in their order: (which of these, program, coordinates)."""
    calls = []
    for name in ("copy_in", "copy_out", "add_out"):
        call = getattr(gluon_on_cpu.Machine, name)

        def noted(self, descriptor, coordinates, *more, name=name, call=call):
            calls.append((name, int(self.program), [int(c) for c in coordinates]))
            call(self, descriptor, coordinates, *more)

        monkeypatch.setattr(gluon_on_cpu.Machine, name, noted)
    return calls


def test_programs_begin_at_different_steps_unless_they_have_one_tile(kernel_on_cpu, log):
    def begun(n: int) -> list[int]:
        log.clear()
        gradients("fp8_wgrad_", TILES[0], True, 7, rows=768, n=n, k=384)
        firsts = {program: place[1] for call, program, place in reversed(log) if call == "copy_in" and len(place) == 2}
        return [firsts[program] for program in range(3)]

    assert begun(384) == [0, 256, 512]
    assert begun(192) == [0, 0, 0]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "cut"), [(128, 0), (768, 2)])
def test_a_tile_leaves_once_unless_its_first_steps_come_last(rows, cut, accumulate, kernel_on_cpu, log):
    """Six tiles of three consumers with four times 32 columns; the first of three programs begins at a tile."""
    gradients("fp8_wgrad_", TILES[0], accumulate, 8, rows=rows, n=384, k=384)
    sent = [call for call, *_ in log]
    stored, added = (0, 6 + cut) if accumulate else (6, cut)
    assert (sent.count("copy_out"), sent.count("add_out")) == (12 * stored, 12 * added)


HAND_BACK = "empty.index(gl.maximum(before, 0)), count=1, pred=before >= 0"
MISTAKES = {
    "a stage is handed back before it is read": {HAND_BACK: "empty.index(stage), count=1"},
    "one consumer keeps its stages": {HAND_BACK: HAND_BACK.replace("before >= 0", "before >= 0 and PART")},
    "fewer bytes are announced than come": {"* (128 + 4)": "* 128"},
    "a chunk is overwritten while it leaves": {"CHUNKS - (LAST - FIRST) if FIRST > 0 else 0": "4"},
    "a stage is awaited that nobody fills": {"pred=first + 128 < end": "pred=True"},
    "a group without rows awaits its first stage": {"pred=start < end": "pred=True"},
    "the phase never turns": {"phase ^ 1": "phase"},
    "chunks change places": {"(zeroth, first, second, third)": "(zeroth, second, first, third)"},
    "what was there is lost": {"True if ACCUMULATE else again": "again"},
    "a tile's two parts overlap": {"gl.where(again, cut, end)": "end"},
    "a tile's second part is another's": {"gl.where(again, 0, turn)": "gl.minimum(turn, own - 1)"},
}
STORED = {
    "the second part is stored over the first": {"True if ACCUMULATE else again": "False"},
    "the second part is added before the first is there": {
        "                    _complete()\n": "                    pass\n"
    },
    "a second part without rows is stored": {
        "not ACCUMULATE and not again": "not ACCUMULATE",
        "True if ACCUMULATE else again": "again and end > start",
    },
    "a group without rows keeps what was there": {"(not ACCUMULATE and not again)": "False"},
}
WITHOUT_CHUNKS = {
    "what was there is not added": {"                    total += there\n": "                    pass\n"},
    "rows lie closer than they do": {"+ rows) * n_in": "+ rows) * 128"},
    "a group's gradient is taken for the first one's": {"group.to(gl.int64) * n_out": "group.to(gl.int64) * 0"},
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *WITHOUT_CHUNKS, *STORED])
def test_a_mistake_is_found(mistake, kernel_on_cpu, monkeypatch):
    """What the tests above would have missed if they passed for another reason."""
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 0.5)
    edits = (MISTAKES | WITHOUT_CHUNKS | STORED)[mistake]
    assert all(any(old in source for source in kernel_on_cpu.sources.values()) for old in edits)
    kernel_on_cpu.edits, kernel_on_cpu.lag = edits, 0.01
    shape = {"ends": [512, 640, 640], "rows": 640, "n": 256, "k": 272}

    def attempt() -> None:
        tile = WgradTile(2, 2, 0 if mistake in WITHOUT_CHUNKS else 2)
        grad, expected = gradients("grouped_fp8_wgrad_", tile, mistake not in STORED, 5, **shape)
        assert relative_norm(grad, expected) <= 1e-6

    assert gluon_on_cpu.found(attempt)


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(groups: int, rows: int, n: int, k: int) -> list:
    """grad, codes and scales of both sides, offsets (none of one group), without memory."""
    shape = (groups, n, k) if groups > 1 else (n, k)
    sides = [
        empty(dtype, *size)
        for width in (n, k)
        for dtype, size in ((torch.float8_e4m3fn, (width, rows)), (torch.float32, (rows // 128, width)))
    ]
    return [empty(torch.float32, *shape), *sides, empty(torch.int32, groups) if groups > 1 else None]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_machine_code_keeps_between_two_products_only_what_needs_the_first(groups, accumulate, tile, monkeypatch):
    monkeypatch.setattr(gluon8_wgrad, "multiprocessors", lambda device: 132)
    with building() as built:
        gluon8_wgrad.launch_wgrad(*operands(groups, 32768, 4096, 7168), accumulate, tile)
    (kernel,) = built
    assert kernel.spills == 0 and kernel.shared <= 232_448
    assert kernel.count("QGMMA.64x128x32.F32.E4M3.E4M3") == 4 * tile.consumers
    assert kernel.count("UTMALDG") == 2 * tile.consumers + 2
    if tile.chunks:
        assert kernel.count("UTMAREDG.3D.ADD") == 4 * tile.consumers
        assert kernel.count(r"CCTL\.IVALL") == tile.consumers, "a second part waits until the first is in memory"
        assert kernel.count("UTMASTG.3D") == (0 if accumulate else 4 * tile.consumers)
        assert not kernel.count(r"\bSHFL|\bSTG|\bRED|\bATOM"), "results leave by TMA, from where the products left them"
    else:
        assert kernel.count(r"\bSTG\.E\.64") == 32 * tile.consumers
        early = r"(LDG\.E\.64(.|\n)*?){32}QGMMA(.|\n)*?gsb0(.|\n)*?STG"
        assert kernel.count(early) == (tile.consumers if accumulate else 0), "what is there is asked for first"
    assert kernel.count(r"USETMAXREG\.\S+ (UP\d, )?" + {2: "0xe8", 3: "0xa0"}[tile.consumers]) >= 2
    # Per consumer: products, all warps meet, the stage before goes back, scales if there is room, products are awaited.
    scaled = r"(.|\n)*?FMUL" if tile.consumers == 2 and tile.chunks else ""
    order = rf"QGMMA[^\n]*gsb0(.|\n)*?BAR\.SYNC(.|\n)*?SYNCS\.ARRIVE{scaled}(.|\n)*?WARPGROUP\.DEPBAR(.|\n)*?FFMA"
    assert kernel.count(order) == tile.consumers
