"""Kernel API. Each public function runs its Triton kernel on CUDA tensors and its plain torch reference elsewhere.

Kernel and reference share module and function names: `norm.rmsnorm` and `reference.norm.rmsnorm`. The references'
docstrings are the contract (shapes, formats, sources); the kernels' files say how. No function here knows autograd, and
none synchronises with the host on a GPU. Shapes are flat over tokens, T = batch x sequence; R = T x top-k expert rows.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from deepv3.kernels.reference import activation as _activation
from deepv3.kernels.reference import adamw as _adamw
from deepv3.kernels.reference import balance as _balance
from deepv3.kernels.reference import e5m6 as _e5m6
from deepv3.kernels.reference import embedding as _embedding
from deepv3.kernels.reference import exchange as _exchange
from deepv3.kernels.reference import gather8 as _gather8
from deepv3.kernels.reference import gemm as _gemm
from deepv3.kernels.reference import gemm8 as _gemm8
from deepv3.kernels.reference import loss as _loss
from deepv3.kernels.reference import norm as _norm
from deepv3.kernels.reference import norm8 as _norm8
from deepv3.kernels.reference import quantise as _quantise
from deepv3.kernels.reference import rope as _rope
from deepv3.kernels.reference import router as _router
from deepv3.kernels.reference import routing as _routing
from deepv3.kernels.reference import swiglu8 as _swiglu8

__all__ = [
    "adamw_",
    "assemble_key",
    "assemble_key_backward",
    "balance_loss",
    "balance_loss_backward",
    "cross_entropy",
    "cross_entropy_",
    "dense_wgrad_",
    "dequantise_rows",
    "e5m6_pack",
    "e5m6_unpack",
    "embedding_wgrad_",
    "fp8_mm",
    "fp8_wgrad_",
    "grouped_fp8_mm",
    "grouped_fp8_wgrad_",
    "grouped_mm",
    "grouped_mm_t",
    "grouped_wgrad_",
    "permute",
    "permute_fp8",
    "places",
    "push",
    "quantise_blocks",
    "quantise_both",
    "quantise_columns",
    "quantise_rows",
    "requantise",
    "rmsnorm",
    "rmsnorm_backward",
    "rmsnorm_fp8",
    "rmsnorm_fp8_columns",
    "rope_query_",
    "router_topk",
    "router_topk_backward",
    "routing_tables",
    "row_bound",
    "signal",
    "sum_of_squares",
    "swiglu",
    "swiglu_backward",
    "swiglu_fp8",
    "swiglu_fp8_backward",
    "take",
    "unpack",
    "unpermute",
    "wait",
]


def _by_device(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs `reference`, or its namesake in deepv3.kernels where the first argument is a CUDA tensor.

    Kernel modules are imported at their first use: machines without Triton run the references.
    """
    module = "deepv3.kernels." + reference.__module__.rsplit(".", 1)[-1]

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), reference.__name__)

    @functools.wraps(reference)
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        return (kernel() if first.is_cuda else reference)(first, *args, **kwargs)

    return call


rmsnorm = _by_device(_norm.rmsnorm)
rmsnorm_backward = _by_device(_norm.rmsnorm_backward)
rope_query_ = _by_device(_rope.rope_query_)
assemble_key = _by_device(_rope.assemble_key)
assemble_key_backward = _by_device(_rope.assemble_key_backward)
router_topk = _by_device(_router.router_topk)
router_topk_backward = _by_device(_router.router_topk_backward)
balance_loss = _by_device(_balance.balance_loss)
balance_loss_backward = _by_device(_balance.balance_loss_backward)
routing_tables = _by_device(_routing.routing_tables)
permute = _by_device(_routing.permute)
unpermute = _by_device(_routing.unpermute)
push = _by_device(_exchange.push)
signal = _by_device(_exchange.signal)
wait = _by_device(_exchange.wait)
take = _by_device(_exchange.take)
places = _by_device(_exchange.places)
unpack = _by_device(_exchange.unpack)
swiglu = _by_device(_activation.swiglu)
swiglu_backward = _by_device(_activation.swiglu_backward)
cross_entropy = _by_device(_loss.cross_entropy)
cross_entropy_ = _by_device(_loss.cross_entropy_)
grouped_mm = _by_device(_gemm.grouped_mm)
grouped_mm_t = _by_device(_gemm.grouped_mm_t)
dense_wgrad_ = _by_device(_gemm.dense_wgrad_)
grouped_wgrad_ = _by_device(_gemm.grouped_wgrad_)
embedding_wgrad_ = _by_device(_embedding.embedding_wgrad_)
adamw_ = _by_device(_adamw.adamw_)
sum_of_squares = _by_device(_adamw.sum_of_squares)

quantise_rows = _by_device(_quantise.quantise_rows)
quantise_columns = _by_device(_quantise.quantise_columns)
quantise_both = _by_device(_quantise.quantise_both)
quantise_blocks = _by_device(_quantise.quantise_blocks)
dequantise_rows = _by_device(_quantise.dequantise_rows)
permute_fp8 = _by_device(_gather8.permute_fp8)
requantise = _by_device(_gather8.requantise)
fp8_mm = _by_device(_gemm8.fp8_mm)
fp8_wgrad_ = _by_device(_gemm8.fp8_wgrad_)
grouped_fp8_mm = _by_device(_gemm8.grouped_fp8_mm)
grouped_fp8_wgrad_ = _by_device(_gemm8.grouped_fp8_wgrad_)
swiglu_fp8 = _by_device(_swiglu8.swiglu_fp8)
swiglu_fp8_backward = _by_device(_swiglu8.swiglu_fp8_backward)
rmsnorm_fp8 = _by_device(_norm8.rmsnorm_fp8)
rmsnorm_fp8_columns = _by_device(_norm8.rmsnorm_fp8_columns)
e5m6_pack = _by_device(_e5m6.e5m6_pack)
e5m6_unpack = _by_device(_e5m6.e5m6_unpack)
row_bound = _routing.row_bound
