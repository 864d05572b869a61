"""Time by group and by kernel of profiled steps, as text."""

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

GROUPS = (
    ("attention", ("cudnn", "sdpa", "flash", "fmha", "sm90_16bit_fprop", "bprop")),
    ("communication", ("nccl", "c10d::", "gloo")),
    ("expert GEMM", ("grouped", "GroupProblemShape", "GemmGrouped")),
    ("dense GEMM", ("nvjet", "gemm", "cutlass", "cublas", "splitK")),
    ("optimizer", ("adamw", "sum_of_squares")),
    ("loss", ("cross_entropy",)),
    ("copy, fill", ("memcpy", "memset", "fill", "copy")),
)
LONGEST = 25


def _on_device(event: Any) -> bool:
    """Whether an event is a kernel or a copy: operators and annotations carry the time of the kernels inside them."""
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def kernel_table(events: Iterable[Any], steps: int, device: bool = True) -> str:
    """Time by group and the longest kernels, ms per step. events: profiler.key_averages().

    device: time on the device; False for a run on the CPU, where operators take the place of kernels.
    """
    field = "self_device_time_total" if device else "self_cpu_time_total"
    kernels = [
        (e.key, getattr(e, field) / 1e3 / steps, e.count // steps) for e in events if not device or _on_device(e)
    ]
    kernels = sorted((k for k in kernels if k[1] > 0), key=lambda k: -k[1])
    total = sum(ms for _, ms, _ in kernels) or 1e-9
    groups: dict[str, float] = {}
    for name, ms, _ in kernels:
        low = name.lower()
        group = next((g for g, parts in GROUPS if any(p.lower() in low for p in parts)), "other")
        groups[group] = groups.get(group, 0.0) + ms
    lines = [f"{'sum of kernels' if device else 'sum of operators':24s} {total:9.2f} ms"]
    lines += [f"  {g:22s} {ms:9.2f} ms  {ms / total:6.1%}" for g, ms in sorted(groups.items(), key=lambda x: -x[1])]
    lines += [f"{ms:9.3f} ms  x{count:<5d} {name[:110]}" for name, ms, count in kernels[:LONGEST]]
    return "\n".join(lines)
