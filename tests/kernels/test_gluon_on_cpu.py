"""The Gluon products' protocol and arithmetic, run as Python (see `gluon_on_cpu`), and their machine code (`sass`)."""

import re

import gluon_on_cpu
import pytest
import torch
from gluon_on_cpu import Descriptor, OnCpu
from inputs import Maker
from inputs8 import make
from sass import building

import deepv3.kernels as kernels
from deepv3.kernels import gemm8
from deepv3.kernels.reference.quantise import row_scales
from deepv3.kernels.testing import relative_norm

gluon8 = pytest.importorskip("deepv3.kernels.gluon8", reason=f"Gluon of Triton {gemm8.GLUON_FOR}x")
gluon8_mm = pytest.importorskip("deepv3.kernels.gluon8_mm", reason=f"Gluon of Triton {gemm8.GLUON_FOR}x")
gluon8_tiles = pytest.importorskip("deepv3.kernels.gluon8_tiles", reason=f"Gluon of Triton {gemm8.GLUON_FOR}x")

PROGRAMS = 3
Tile = gluon8_mm.Tile
# Fewer stages than steps and more, of every tile.
TILES = [Tile(2, 128, 4), Tile(2, 192, 3), Tile(3, 128, 2), Tile(2, 256, 2)]
TILES += [Tile(2, 128, 2), Tile(2, 192, 2), Tile(3, 128, 4), Tile(2, 256, 3)]
# Tiles of 192 rows that end with a group, reach into the next one, and into rows of nobody.
ENDS = {
    "first empty": [0, 128, 384],
    "last empty": [256, 384, 384],
    "all empty": [0, 0, 0],
    "full": [128, 128, 512],
    "three in two tiles": [384, 512, 512],
}


@pytest.fixture(autouse=True)
def kernel_on_cpu(monkeypatch) -> OnCpu:
    """Launches run the kernel as Python, three programs wide."""
    stand_in = OnCpu("mm_kernel", gluon8, gluon8_tiles, gluon8_mm)
    monkeypatch.setattr(gluon8, "describe", Descriptor)
    monkeypatch.setattr(gluon8_mm, "mm_kernel", stand_in)
    monkeypatch.setattr(gluon8_mm, "multiprocessors", lambda device: PROGRAMS)
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


@pytest.mark.parametrize("tile", gluon8_mm.MM_TILES, ids=str)
def test_stages_and_result_fill_shared_memory_and_no_more(tile):
    for dtype in (torch.bfloat16, torch.float32):
        for groups in (0, 32, 128, 256):
            stages = tile.fitting(dtype, groups)
            leaving = tile.m * (128 if tile.n == 256 else tile.n) * dtype.itemsize
            used = stages * ((tile.m + tile.n) * 128 + 512) + leaving + groups * 4
            assert 3 <= stages <= tile.stages and used <= 232_448 - 384
    assert tile.fitting(torch.bfloat16, 128) == tile.stages


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(300, 272, 272), (1, 16, 128), (128, 640, 1040)])
def test_product_of_any_shape(rows, n, k, tile):
    *operands, _ = make("fp8_mm", Maker(1, torch.float32), rows=rows, n=n, k=k)
    out = torch.full((rows, n), float("nan"))
    gluon8_mm.launch_mm(out, *operands, None, tile)
    assert relative_norm(out, kernels.fp8_mm.__wrapped__(*operands, torch.float32)) <= 1e-6


@pytest.mark.parametrize("tile", TILES[:4], ids=str)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_product_of_uneven_experts(ends, tile):
    *operands, offsets, _ = make("grouped_fp8_mm", Maker(2, torch.float32), ends=ends, rows=512, n=272, k=400)
    out = torch.full((512, 272), float("nan"))
    gluon8_mm.launch_mm(out, *operands, offsets, tile)
    assert relative_norm(out, kernels.grouped_fp8_mm.__wrapped__(*operands, offsets, torch.float32)) <= 1e-6
    assert (out[ends[-1] :] == 0).all()


@pytest.mark.parametrize("tile", TILES[1:4], ids=str)
def test_rows_of_nobody_are_zero_whatever_they_hold(tile):
    *operands, offsets, _ = make("grouped_fp8_mm", Maker(3, torch.float32), ends=[128], rows=256, n=272, k=400)
    operands[0].view(torch.uint8)[128:] = 0x7F  # NaN
    out = torch.full((256, 272), float("nan"))
    gluon8_mm.launch_mm(out, *operands, offsets, tile)
    assert (out[128:] == 0).all() and out[:128].isfinite().all()


SEND = "        _send(outs, totals, staging, row, end, cols, PART)\n"
POINTERS = "        scales_ptr = weight_scales_ptr + group * group_stride\n"
BEFORE, THIS = "        _hand_back(empty.index(before))\n", "        _hand_back(empty.index(stage))\n"
LAST = "    products = warpgroup_mma_wait(0, deps=(last,))\n"
FULL = {
    "        mbarrier.wait(full.index(following), following_phase)\n",
    "        mbarrier.wait(full.index(stage), phase)\n",
}
READY = "            ready = full.index(stage)\n"
SLOW = {READY: READY + "            __import__('time').sleep(0.02)\n"}  # copies, for once slower than products
# Of both forms, stages that go back a step late and early; then of one.
MISTAKES = {
    "the producer waits for a stage nobody has used": {"stage, phase = 0, 1": "stage, phase = 0, 0"},
    "one consumer keeps its stages": {
        BEFORE: "        if PART == 0:\n    " + BEFORE,
        THIS: "        if PART == 0:\n    " + THIS,
    },
    "a stage is handed back before it is read": {
        BEFORE: THIS,
        LAST + "    if": "    if",
        THIS + "    total": THIS + LAST + "    total",
    },
    "fewer bytes are announced than come": {" + scales.block_shape[0] * 4": ""},
    "the last part is added while it is multiplied": {LAST: LAST.replace("0", "1")},
    "a tile is overwritten while it leaves": {"            tma.store_wait(0)\n": ""},
    "a tile is sent to the next one's place": {SEND: "", POINTERS: SEND + POINTERS},
    "a tile begins with the sums of the last": {"N, STAGES, True)": "N, STAGES, False)"},
    "a step's scales are used for the next": {"gl.minimum(step + 1, steps - 1)": "step"},
    "the phase never turns": {"phase ^ 1": "phase"},
    "a stage is not waited for": SLOW | dict.fromkeys(FULL, "        pass\n"),
}
MISTAKES_192 = {
    "before the first step a stage is handed back": {"at = (STAGES, 0, 0)": "at = (STAGES - 1, 0, 0)"},
    "the stage after the last never comes": {"mbarrier.arrive(full.index(stage), count=1)": "pass"},
    "the 64 columns are added while they are multiplied": {"warpgroup_mma_wait(1": "warpgroup_mma_wait(2"},
    "parts of odd tiles lie across blocks of scales": {"(col + (1 - odd) * 128, col + odd * 64)": "(col + 128, col)"},
}
MISTAKES_256 = {
    "a half is overwritten while it leaves": {"i % len(staging) == 0": "i == 0"},
    "the first half is added while it is multiplied": {
        "        products = warpgroup_mma_wait(0": "        products = warpgroup_mma_wait(1"
    },
    "the second half is added to the first": {"use_acc=stage < 0": "use_acc=stage >= 0"},
    "the second half has the scales of the first": {"for col in cols]": "for col in (cols[0], cols[0])]"},
}
OF_TILE = {
    Tile(2, 192, 2): MISTAKES | MISTAKES_192,
    Tile(3, 128, 2): MISTAKES,
    Tile(2, 256, 2): MISTAKES | MISTAKES_256,
}


@pytest.mark.parametrize(
    ("tile", "mistake"), [(tile, name) for tile, mistakes in OF_TILE.items() for name in mistakes], ids=str
)
def test_a_mistake_in_the_protocol_is_found(tile, mistake, kernel_on_cpu, monkeypatch):
    """What the tests above would have missed if they passed for another reason."""
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 0.5)
    kernel, edits = kernel_on_cpu, OF_TILE[tile][mistake]
    assert all(any(old in source for source in kernel.sources.values()) for old in edits)
    kernel.edits, kernel.lag = edits, 0.01
    *operands, _ = make("fp8_mm", Maker(5, torch.float32), rows=512, n=384, k=512)
    expected = kernels.fp8_mm.__wrapped__(*operands, torch.float32)

    def attempt() -> None:
        out = torch.full((512, 384), float("nan"))
        gluon8_mm.launch_mm(out, *operands, None, tile)
        assert relative_norm(out, expected) <= 1e-6

    assert gluon_on_cpu.found(attempt)


GROUPED_MISTAKES = {
    "rows of the next group are written": {
        "    if row + PART * 64 < end:\n": "    if row + PART * 64 < (end + 64) // 128 * 128 + 64:\n"
    },
    "a group's last tile is forgotten": {"gl.cdiv(end - start, M)": "(end - start) // M"},
    "a group's tiles are counted from the first one": {"(tile_m - before)": "tile_m"},
    "a group's rows begin where its tiles would if it were alone": {
        "        row = start": "        row = start // 192 * 192"
    },
}


@pytest.mark.parametrize("mistake", GROUPED_MISTAKES)
def test_a_mistake_in_finding_a_groups_rows_is_found(mistake, kernel_on_cpu):
    kernel = kernel_on_cpu
    assert all(any(old in source for source in kernel.sources.values()) for old in GROUPED_MISTAKES[mistake])
    shape = {"ends": [128, 512, 640], "rows": 768, "n": 144, "k": 128}
    *operands, offsets, _ = make("grouped_fp8_mm", Maker(6, torch.float32), **shape)
    expected = kernels.grouped_fp8_mm.__wrapped__(*operands, offsets, torch.float32)
    outs = [torch.full((768, 144), float("nan")) for _ in range(2)]
    gluon8_mm.launch_mm(outs[0], *operands, offsets, Tile(3, 128, 2))
    kernel.edits = GROUPED_MISTAKES[mistake]
    gluon8_mm.launch_mm(outs[1], *operands, offsets, Tile(3, 128, 2))
    assert relative_norm(outs[0], expected) <= 1e-6 < relative_norm(outs[1], expected)


def operands(groups: int, rows: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Arguments of a launcher on the meta device: result, codes, scales, weight, its scales, offsets."""
    meta = torch.device("meta")
    stacked = (groups,) if groups > 1 else ()
    return [
        torch.empty(rows, n, dtype=dtype, device=meta),
        torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=meta),
        row_scales(rows, k, meta),
        torch.empty(*stacked, n, k, dtype=torch.float8_e4m3fn, device=meta),
        torch.empty(*stacked, -(-n // 128), -(-k // 512) * 4, device=meta),
        torch.empty(groups, dtype=torch.int32, device=meta) if groups > 1 else None,
    ]


EVENTS = {
    r"QGMMA(?![^\n]*gsb0)": "q",
    r"QGMMA[^\n]*gsb0": "Q",
    r"DEPBAR\.LE gsb0, 0x0": "W",
    r"DEPBAR\.LE gsb0, 0x1": "w",
    r"BAR\.SYNC": "b",
    r"SYNCS\.ARRIVE": "r",
    r"PHASECHK": "p",
    r"FFMA": "f",
    r"ST[SM]+\.": "s",
    r"UTMASTG": "o",
}
# Of a step: products (q, the last of a part Q) and waits until all or all but the last part are there (W, w); all warps
# meet and a stage is handed back (b, r), the next one is waited for (p); additions (f).
LATE, EARLY = r"Q[^QW]*b[^QW]*r[^QW]*p[^QW]*Wf", r"W[^rQ]{0,48}b[^rQ]{0,48}rf{16}"
STEPS = {
    (3, 128): rf"p[^QW]*Q[^QW]*{EARLY}",
    (2, 128): LATE,
    (2, 192): r"Q[^QW]*Q[^QW]*b[^QW]*r[^QW]*w(?=[^QW]*p)[^QW]*f{16}[^QW]*Wf",
    (2, 256): rf"Q[^QW]*Wf{{64}}q[^QW]*Q[^QW]*p[^QW]*{EARLY}",
}


def events(code: str) -> str:
    """The instructions that count, a letter each."""
    letters = [
        next(letter for kind, letter in EVENTS.items() if re.match(kind, at))
        for at in re.findall(rf"(?:{'|'.join(EVENTS)})[^;]*", code)
    ]
    return "".join(letters)


@pytest.mark.parametrize("tile", gluon8_mm.MM_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("groups", "rows", "n", "k"), [(4, 32768, 4096, 7168), (1, 4096, 2112, 7168)])
def test_machine_code_has_nothing_between_products_that_could_be_behind_them(
    groups, rows, n, k, dtype, tile, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setattr(gluon8_mm, "multiprocessors", lambda device: 132)
    with building() as built:
        gluon8_mm.launch_mm(*operands(groups, rows, n, k, dtype), tile)
    (kernel,) = built
    parts = 1 if tile.n == 128 else 2
    assert kernel.spills == 0 and kernel.shared <= 232_448
    producer, consumer = {2: ("28", "e8"), 3: ("18", "a0")}[tile.consumers]
    assert kernel.count(rf"USETMAXREG\.DEALLOC\.CTAPOOL 0x{producer}") >= 1
    assert kernel.count(rf"USETMAXREG\.\S+ (UP\d, )?0x{consumer}") >= 2
    # Consumers with a tile's first step and the loop over the others each; a part's last product is waited for.
    assert kernel.count(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3") == 8 * tile.consumers * (tile.n // 128)
    assert kernel.count(r"QGMMA\.64x64x32\.F32\.E4M3\.E4M3") == 8 * tile.consumers * (tile.n == 192)
    assert kernel.count(r"QGMMA[^\n]*gsb0") == 2 * tile.consumers * parts, "each product is waited for by itself"
    assert kernel.count("UTMALDG") == tile.consumers + 1 + parts
    assert kernel.count("R2UR") <= 20 * tile.consumers, "what all lanes share is in registers of every lane"
    code = events(kernel.code)
    assert len(re.findall(STEPS[tile.consumers, tile.n], code)) >= tile.consumers, "a loop's step per consumer"
    assert len(re.findall(r"Q[^QW]*s[^QW]*o[^QW]*[Ww]", code)) >= tile.consumers, "a tile leaves behind the next one"


@pytest.mark.parametrize("tile", gluon8_mm.MM_TILES, ids=str)
@pytest.mark.parametrize("groups", [128, 256])
def test_many_groups_leave_room_for_what_the_compiler_needs(groups, tile, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(gluon8_mm, "multiprocessors", lambda device: 132)
    for dtype in (torch.bfloat16, torch.float32):
        with building() as built:
            gluon8_mm.launch_mm(*operands(groups, 32768, 512, 1024, dtype), tile)
        assert built[0].shared <= 232_448
