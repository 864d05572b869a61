"""Export and import hold a few tensors in memory, never the model: measured while they run, in a process of their own,
where no thread of another test takes memory meanwhile."""

import ctypes
import gc
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_run import BLOCKED, save_run

from deepv3 import arithmetic
from deepv3.export.hf import export
from deepv3.export.importer import import_hf

# About 14 M parameters, 55 MB in FP32, most of them in experts as in a large model; the largest tensor has 0.5 MB.
WIDE = BLOCKED | {"n_routed_experts": 64, "num_hidden_layers": 4, "initializer_range": 0.02, "vocab_size": 1024}
SHARD_BYTES = 1_000_000


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10


@contextmanager
def peak():
    """A list whose one entry is, afterwards, the most private memory over the beginning's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier work has freed would hide what this one takes
    base, seen, done = private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            seen[0] = max(seen[0], private_bytes() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("wide") / "run", 3, False, **WIDE)


@pytest.fixture(scope="module")
def alone():
    """A fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def measure(run_dir: Path, folder: Path, dtype: str) -> tuple[int, int, int]:
    """Most private memory of an export and of its import, bytes; the number of its shards."""
    # Once before it counts: code and libraries come into memory.
    import_hf(export(run_dir, folder / "first", dtype), folder / "warm", shard_bytes=SHARD_BYTES)
    with peak() as exporting:
        export(run_dir, folder / "hf", dtype, shard_bytes=SHARD_BYTES)
    with peak() as importing:
        import_hf(folder / "hf", folder / "imported", shard_bytes=SHARD_BYTES)
    return exporting[0], importing[0], len(list((folder / "hf").glob("*.safetensors")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_export_and_import_hold_a_fraction_of_the_model(dtype, run, alone, tmp_path):
    whole = 4 * arithmetic.parameters(run.cfg.model).stored
    assert whole > 50e6
    exporting, importing, shards = alone.submit(measure, run.dir, tmp_path, dtype).result()
    assert shards > 10
    assert exporting < 6 * SHARD_BYTES < whole / 8, f"{exporting / 1e6:.1f} MB"  # measured: 3
    assert importing < 6 * SHARD_BYTES, f"{importing / 1e6:.1f} MB"
    print(f"{dtype}: export {exporting / 1e6:.1f} MB, import {importing / 1e6:.1f} MB of {whole / 1e6:.1f}")
