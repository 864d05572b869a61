"""Says what filled the GPU when it is full, and which knobs free it."""

import torch

from deepv3.config.schema import Config
from deepv3.errors import ResourceError

GIB = 2**30


def held(run) -> dict[str, int]:
    """Bytes of the long-lived tensors of a run on this rank: weights, master weights, gradients, moments."""
    parameters = list(run.model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    fragments = run.engine.fragments()
    masters = [f.master for f in fragments if f.master.untyped_storage().data_ptr() not in weights]  # FP32: the same
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters),
        "master weights": sum(m.numel() * m.element_size() for m in masters),
        "moments": sum(t.numel() * t.element_size() for f in fragments for t in (f.exp_avg, f.exp_avg_sq)),
    }


def explain(error: torch.OutOfMemoryError, cfg: Config, long_lived: dict[str, int]) -> ResourceError:
    """The same failure in the user's terms: what held the memory and the knobs that free it."""
    in_use = torch.cuda.memory_allocated() if torch.cuda.is_available() else sum(long_lived.values())
    parts = dict(long_lived)
    parts["activations and workspace"] = max(0, in_use - sum(long_lived.values()))
    table = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    knobs = (
        [f"train.micro_batch_size={max(1, cfg.train.micro_batch_size // 2)}"] if cfg.train.micro_batch_size > 1 else []
    )
    if cfg.train.recompute != "full":
        knobs.append("train.recompute=" + ("selective" if cfg.train.recompute == "none" else "full"))
    if cfg.train.loss_chunk > 512:
        knobs.append(f"train.loss_chunk={cfg.train.loss_chunk // 2}")
    knobs += [
        f"data.seq_len={cfg.data.seq_len // 2}",
        "more data-parallel ranks (ZeRO-1 divides master weights and moments)",
    ]
    return ResourceError(
        f"GPU memory exhausted. In use, GiB: {table}. {str(error).split('. ')[0]}. What frees some: {'; '.join(knobs)}"
    )
