"""Weight gradient of the embedding: plain torch."""

from torch import Tensor


def embedding_wgrad_(grad: Tensor, ids: Tensor, dy: Tensor) -> None:
    """grad[ids[t]] += dy[t] for every t, in token order. grad: [V, D] FP32; ids: [T] int64; dy: [T, D]."""
    grad.index_add_(0, ids, dy.to(grad.dtype))
