"""Builds the kernels a launcher would launch, for sm_90 and without a GPU, and reads their machine code.

A stand-in driver names the target; launches are turned into compilations; launchers get tensors on the meta device, so
argument formats and divisibility are those of real calls at real shapes.
"""

import contextlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Built(NamedTuple):
    """One compiled kernel: its name, registers per thread, bytes of shared memory, machine code, and Triton's own."""

    name: str
    registers: int
    shared: int
    code: str
    ttgir: str

    def count(self, pattern: str) -> int:
        """Instructions whose text matches the regular expression."""
        return len(re.findall(pattern, self.code))

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.count(r"\b(LDL|STL)\b")

    @property
    def reductions(self) -> list[str]:
        """Shape and distribution over lanes of what every reduction reads, in order."""
        layouts = dict(re.findall(r"^(#\w+) = (.*)$", self.ttgir, re.MULTILINE))
        read = re.findall(r"\}\) : \(tensor<([^,>]*), (#\w+)>\) -> tensor<", self.ttgir)
        return [f"{shape} {layouts[layout]}" for shape, layout in read]


class _Target:
    """What Triton asks of a driver before it compiles."""

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return -1  # its own cache of built kernels: a GPU in this machine never runs them

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


@contextlib.contextmanager
def building() -> Iterator[list[Built]]:
    """Within the block, launches compile for sm_90 and append to the list; nothing runs."""
    built: list[Built] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        built.append(_read(kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Target())
    try:
        yield built
    finally:
        JITFunction.run = run
        driver._active = None  # the real one is found again at its next use


def _read(kernel) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        code = _tool("nvdisasm", "-c", str(path))
        usage = _tool("cuobjdump", "-res-usage", str(path))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    return Built(kernel.metadata.name, registers, kernel.metadata.shared, code, kernel.asm["ttgir"])


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], check=True, capture_output=True, text=True).stdout
