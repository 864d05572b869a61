"""FP8 codes of a weight, made once per optimizer step however many micro-batches use them (V3 3.3.3).

They come from the model's BF16 weight, not from the FP32 master: a rank holds a shard of the masters only, and blocks
of 128 x 128 lie across shards. Rounding twice moves few codes, by one step (docs/numerics.md).
"""

from torch import Tensor

import deepv3.kernels as kernels
from deepv3.precision.formats import SQUARES, Blocks, Format


class WeightCodes:
    """Call it for the `Blocks` of `weight` as it is now.

    Whoever rewrites a weight behind autograd's back counts up its attribute `revision` (the optimizer does, after steps
    and after a checkpoint was loaded); a changed storage and torch's own in-place writes are seen without that. The
    codes are made on the stream of the first caller: all callers are on one.
    """

    def __init__(self, weight: Tensor, format: Format) -> None:
        assert format.tile == SQUARES.tile, f"weights are quantised in blocks of 128 x 128, not {format.tile}"
        self._weight, self._format = weight, format
        self._seen: tuple[int, ...] = ()
        self._blocks: Blocks | None = None

    def __call__(self) -> Blocks:
        weight = self._weight
        now = (weight.data_ptr(), weight._version, getattr(weight, "revision", 0))
        if self._blocks is None or self._seen != now:
            self._blocks = None  # free the old ones first
            self._blocks = Blocks(*kernels.quantise_blocks(weight.detach(), self._format.pow2))
            self._seen = now
        return self._blocks

    def forget(self) -> None:
        """Free the codes; the next call makes them again."""
        self._blocks = None
