"""Which implementation of an operation runs: measured once per shape and machine, kept in a file, visible, overridable.

    backends.choices()                     what was measured: microseconds per implementation, or why it was left out
    backends.force("fp8_mm", "cublas")     from now on this one, without measuring; force("fp8_mm", None) undoes it
    backends.use_file(path)                another file than ~/.cache/deepv3/kernels.json; None keeps nothing

The first call with a new shape (rows of tokens count up to a power of two) runs every implementation on that call's
operands: one that raises, or whose result is off by more than rounding, is left out and the reason is kept; the fastest
is taken. That call waits for the device, later ones do not. On other devices than CUDA, while a graph is captured, and
when memory is short, the first implementation runs and nothing is kept. Implementations differ in the last bits: to
repeat a run's bits on another machine, take its file along or force one.
"""

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

REPEATS = 10
ALLOWED = 5e-3  # between two BF16 results of the same codes, by norm; rounding makes 2e-3

Run = Callable[[Callable[..., Any]], Tensor]

_file: Path | None = Path.home() / ".cache" / "deepv3" / "kernels.json"
_measured: dict[str, dict[str, Any]] | None = None  # of this machine; None: the file has not been read
_forced: dict[str, str] = {}


def use_file(path: Path | str | None) -> None:
    """Keep choices in this file from now on, starting with those in it."""
    global _file, _measured
    _file, _measured = None if path is None else Path(path), None


def force(op: str, name: str | None) -> None:
    """Let `name` do every `op` from now on; None measures again. The names are the keys of `gemm8.BACKENDS[op]`."""
    if name is None:
        _forced.pop(op, None)
    else:
        _forced[op] = name


def choices() -> dict[str, dict[str, Any]]:
    """'op shape' -> {"best": name, "us": {name: microseconds}, "left_out": {name: reason}} on this machine."""
    return dict(_known())


def choose(
    op: str,
    shape: tuple[Any, ...],
    table: Mapping[str, Callable[..., Any]],
    unasked: Sequence[str],
    run: Run,
    device: torch.device,
) -> str:
    """The name in `table` to use for `op` with this shape: the forced one, else the fastest of `unasked`.

    run(implementation) computes a result, and does no harm.
    """
    if op in _forced:
        if _forced[op] not in table:
            raise ValueError(f"{op} is forced to {_forced[op]!r}, which is none of: {', '.join(table)}")
        return _forced[op]
    if len(unasked) == 1 or device.type != "cuda":
        return unasked[0]
    key = f"{op} {' x '.join(str(size) for size in shape)}"
    known = _known()
    if key not in known or known[key]["best"] not in unasked:
        if torch.cuda.is_current_stream_capturing():
            return unasked[0]
        try:
            known[key] = _measure({name: table[name] for name in unasked}, run)
        except torch.OutOfMemoryError:
            return unasked[0]
        _save()
    return known[key]["best"]


def _measure(table: Mapping[str, Callable[..., Any]], run: Run) -> dict[str, Any]:
    times: dict[str, float] = {}
    left_out: dict[str, str] = {}
    expected: Tensor | None = None
    for name, implementation in table.items():
        try:
            result = run(implementation)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a library raises at a shape it does not take
            left_out[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        if expected is None:
            expected = result.float()
        elif (off := _distance(result, expected)) > ALLOWED:
            left_out[name] = f"its result is off by {off:.1e} of the norm"
            continue
        times[name] = _time(lambda chosen=implementation: run(chosen))
    if not times:
        raise RuntimeError(f"no implementation takes this shape: {left_out}")
    return {"best": min(times, key=lambda name: times[name]), "us": times, "left_out": left_out}


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Relative error norm where both are finite; infinite if they are not in the same places."""
    actual = actual.float()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    difference = (actual - expected).where(finite, 0.0).norm()
    return float(difference / expected.where(finite, 0.0).norm().clamp(min=1e-30))


def _time(call: Callable[[], Any]) -> float:
    """Median microseconds of REPEATS calls by events."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    call()
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3, 2)


def _machine() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def _read() -> dict[str, Any]:
    """The whole file; empty where there is none, or none that can be read: then shapes are measured again."""
    try:
        return json.loads(_file.read_text(encoding="utf-8")) if _file is not None else {}
    except (OSError, ValueError):
        return {}


def _known() -> dict[str, dict[str, Any]]:
    global _measured
    if _measured is None:
        _measured = _read().get(_machine(), {}) if torch.cuda.is_available() else {}
    return _measured


def _save() -> None:
    """Write what is known beside what other processes wrote; by rename, so that none reads half a file."""
    global _file
    if _file is None:
        return
    content = _read()
    content[_machine()] = {**content.get(_machine(), {}), **_known()}
    try:
        _file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
        os.replace(name, _file)
    except OSError as error:
        warnings.warn(f"choices of kernels are not kept: {error}; see deepv3.kernels.backends.use_file", stacklevel=4)
        _file = None
