"""The exchange's kernels build for sm_90: rows move 16 bytes at a time, flags have system scope. No GPU is needed."""

import re
from unittest import mock

import pytest
import torch
from sass import Built, building

from deepv3.kernels import exchange


def int32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def int64(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def build(name: str, *args) -> Built:
    """What one call of the launcher builds."""
    tables = mock.patch.object(exchange, "_table", lambda tensors, device: int64(len(tensors)))
    with tables, mock.patch.object(exchange, "multiprocessors", lambda device: 132), building() as built:
        getattr(exchange, name)(*args)
    return built[0]


AREA, RECORDS, COUNTS, FLAGS = int32(4, 8192, 1024), int32(4, 8192, 16), int32(4), int64(4)


@pytest.mark.parametrize(
    "call",
    [
        ("push", int32(8192, 1024), [AREA] * 4, COUNTS, 1, int32(65536)),
        ("push", AREA.flatten(0, 1), [AREA] * 4, COUNTS, 1),
        ("push", int32(4096, 3584), [int32(8, 4096, 3584)] * 8, int32(8), 7, int32(32768)),
        ("take", AREA, COUNTS),
    ],
    ids=["rows", "rows home", "V3", "take"],
)
def test_rows_move_16_bytes_at_a_time_to_the_peers_too(call):
    built = build(*call)
    assert built.spills == 0
    assert built.count(r"\bLDG\.E\.128") >= 8 and built.count(r"\bSTG\.E\.128") == built.count(r"\bSTG\.E") == 8


def test_a_flag_is_stored_behind_a_fence_of_the_system():
    built = build("signal", COUNTS, [FLAGS] * 4, 1, 5)
    assert re.search(r"MEMBAR\.\w+\.SYS.*ATOMG\.E\.EXCH\.64\.STRONG\.SYS", built.code, re.DOTALL)


def test_flags_are_acquired_from_the_system_and_the_clock_is_read():
    built = build("wait", FLAGS, 5, AREA, COUNTS, 10.0)
    assert built.count(r"ATOMG\.E\.ADD\.64\.STRONG\.SYS") == 2 and built.count("GLOBALTIMER") >= 2
    assert built.spills == 0


def test_labels_build_without_spills():
    assert build("places", int32(8192, 8), int32(8192, 8), COUNTS, 8192).spills == 0
    assert build("unpack", RECORDS, COUNTS, 0, torch.float32, 8, 16, 16).spills == 0
