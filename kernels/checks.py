"""What every launcher checks before it launches, and the few figures of the device a launch needs.

A check costs about a microsecond; a wrong stride read by a kernel costs a silent wrong answer or an illegal address.
"""

import functools

import torch
from torch import Tensor

ACTIVATIONS = (torch.bfloat16, torch.float32)
FP32 = (torch.float32,)
INT32 = (torch.int32,)
E4M3 = (torch.float8_e4m3fn,)


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
    unit: int = -1,
) -> None:
    """Raise ValueError (shape, strides, device) or TypeError (format), naming what was given and what is needed.

    shape: None takes any size. contiguous=False asks for unit stride in one dimension only, by default the last.
    """
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    for size, want in zip(sizes, shape):  # any() with a generator takes twice as long
        if want is not None and want != size:
            fits = False
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(sizes)}, needed [{wanted}]")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}, needed {wanted}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the first argument on {device}: move one of them")
    if contiguous:
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, needed contiguous: call .contiguous() on it")
    elif tensor.stride(unit) != 1 and sizes[unit] > 1 and tensor.numel():
        where, mend = ("last", "call .contiguous() on it") if unit == -1 else ("first", "pass the scales as they came")
        raise ValueError(f"{name} has strides {tensor.stride()}, needed 1 in the {where} dimension: {mend}")


def cdiv(size: int, part: int) -> int:
    """Parts of which `size` needs. Triton's own, made for its compiler too, takes two microseconds on the host."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 in the interpreter, which has none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def block(width: int, largest: int) -> int:
    """Columns one program takes of a row: a power of two of at most `largest`.

    1. The largest power of two dividing the width, if it reaches 256: no lane idles (7168 -> 1024, 2048 -> 2048).
    2. Else the width rounded up to a power of two, with the rest masked.
    """
    divisor = width & -width
    if divisor >= 256:
        return min(divisor, largest)
    return min(next_power_of_2(width), largest)


def check_width(name: str, width: int) -> None:
    """FP8 rows begin at multiples of 16 bytes, which vector loads and descriptors need."""
    if width % 16:
        raise ValueError(f"{name} has rows of {width}, FP8 needs a multiple of 16")


def check_scales(name: str, scales: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Scales of row-quantised codes: rows contiguous, column blocks at multiples of 16 bytes."""
    check(name, scales, shape, FP32, device, contiguous=False, unit=0)
    if scales.numel() and scales.shape[1] > 1 and (scales.stride(1) % 4 or scales.stride(1) < shape[0]):
        raise ValueError(
            f"{name} has strides {scales.stride()}, needed (1, rows rounded up to 4): take them from `quantise_rows`"
        )


def check_rows8(name: str, codes: Tensor, scales: Tensor, device: torch.device) -> tuple[int, int]:
    """Rows and columns of row-quantised codes [M, K], after their checks and their scales'."""
    check(name, codes, (None, None), E4M3, device)
    m, k = codes.shape
    check_width(name, k)
    check_scales(f"scales of {name}", scales, (m, -(-k // 128)), device)
    return m, k


def check_block_scales(name: str, scales: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Scales of 128x128 blocks, rows at multiples of 16 bytes."""
    check(name, scales, shape, FP32, device, contiguous=False)
    if scales.numel() and scales.shape[-2] > 1 and scales.stride(-2) % 4:
        raise ValueError(
            f"{name} has strides {scales.stride()}, needed rows at multiples of 4: take them from `quantise_blocks`"
        )
