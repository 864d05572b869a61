"""AdamW over flat FP32 master partitions, with moments in BF16 (V3 3.3.3) or FP32.

The optimizer sees one flat tensor per parameter group and runs one kernel on it: moments, decay, master weight and the
low-precision weight in the same pass. Given up: closures, sparse gradients, per-parameter options.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepv3.kernels import adamw_


class AdamW(torch.optim.Optimizer):
    """params: groups with a `weight_decay` each. What is stepped is flat FP32 with its gradient in `.grad`.

    Moments are allocated by `allocate`, before the first step, so that memory is known at the start.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        beta1: float,
        beta2: float,
        eps: float,
        moment_dtype: torch.dtype,
    ):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.moment_dtype = moment_dtype
        self.outputs: dict[Tensor, Tensor] = {}

    def allocate(self, master: Tensor, output: Tensor | None) -> None:
        """Zero moments for a flat master. output: low-precision weights of the same elements, written by each step."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[master][name] = torch.zeros_like(master, dtype=self.moment_dtype)
        if output is not None:
            self.outputs[master] = output

    @torch.no_grad()
    def step(self, lr: float, count: Tensor, grad_scale: Tensor) -> None:  # type: ignore[override]
        """One step. count: 0-dim, steps applied, this one included; grad_scale: 0-dim FP32, not finite skips it."""
        for group in self.param_groups:
            group["lr"] = lr
            for master in group["params"]:
                state = self.state[master]
                adamw_(
                    master,
                    master.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    self.outputs.get(master),
                    lr,
                    self.beta1,
                    self.beta2,
                    self.eps,
                    group["weight_decay"],
                    count,
                    grad_scale,
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which turns moments into the parameters' format; here they keep `moment_dtype` bit for bit."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(self.moment_dtype)
