"""The one file that imports deepspeed: ZeRO-1 with FP32 gradients, our reduction, our norm, our AdamW.

From DeepSpeed come DeepSpeedEngine and BF16_Optimizer, both subclassed. Not used of them: forward, backward, gradient
hooks, all-reduce, norm, clipping, LR schedules, checkpoints. How a step goes:

1. `begin_step`; the kernels write FP32 weight gradients to `param.main_grad`, views of one flat buffer per group
   (flat.py): the first write of a step stores, later ones add, told apart by `param.grad_ready`.
2. `reduce(chunk)` once a chunk's last weight gradient is done: seals its groups and starts their reduce-scatter.
3. `finish_step`: reduces what is left, sums the squares of every shard in FP64 over the world (each element has one
   owner, so layouts agree), clips, runs AdamW, which writes the low-precision shard in the same pass, and gathers the
   shards. A norm that is not finite moves nothing and is counted. All on the device: the host never waits.

One path for every precision: parameters are FP32 or BF16, the optimizer class is the same, and DeepSpeed is told BF16.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

os.environ.setdefault(
    "DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"
)  # else it probes for eight kinds

import deepspeed
import deepspeed.comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups as deepspeed_groups

from deepv3.config.schema import Config, OptimConfig
from deepv3.dist import Grid
from deepv3.kernels import sum_of_squares
from deepv3.optim.adamw import AdamW
from deepv3.optim.flat import FlatGroup, Fragment, flat_groups, owner_of

deepspeed.ops.__compatible_ops__ = {}  # nothing of DeepSpeed's C++ is used; left alone it looks for compilers


class StepStats(NamedTuple):
    """Outcome of a step, on the device. norm: 0-dim FP32, global, before clipping; skipped: 0-dim bool."""

    norm: Tensor
    skipped: Tensor


class _Mpu:
    """The grid as DeepSpeed asks for it. Model parallel means pipeline here: ranks with other parameters."""

    def __init__(self, grid: Grid):
        self._grid = grid

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.group("zero")

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._grid.group("zero"))

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._grid.group("zero"))

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.group("pp_act")

    def get_model_parallel_world_size(self) -> int:
        return self._grid.pp_size

    def get_model_parallel_rank(self) -> int:
        return self._grid.pp_rank


class ShardedOptimizer(BF16_Optimizer):
    """BF16_Optimizer with flat.py's buffers, no hooks, and a step that the host does not wait for.

    BF16_Optimizer's own __init__ is passed over: it copies whole buffers, prints, and imports a compiler for Muon.
    Its attributes are set here instead, so that its remaining methods and DeepSpeed's engine find what they read.
    """

    def __init__(self, adamw: AdamW, groups: list[FlatGroup], grid: Grid, clip_norm: float, param_names: dict):
        super(BF16_Optimizer, self).__init__()
        self.optimizer = self.adamw = adamw
        self.groups, self.grid = groups, grid
        self.clip_grad, self.norm_type, self.grad_acc_dtype = clip_norm, 2, torch.float32
        self.param_names, self.dp_process_group = param_names, grid.group("zero")
        self.using_real_optimizer, self.overflow, self.custom_loss_scaler = True, False, False
        self.external_loss_scale = self.torch_autocast_gradscaler = None
        self.immediate_grad_update = self.has_moe_layers = False
        self._setup_for_real_optimizer()
        self.applied = torch.zeros((), dtype=torch.int64, device=groups[0].low.device)  # steps that moved the weights
        self.skipped = torch.zeros_like(self.applied)

    def _setup_for_real_optimizer(self) -> None:
        self._grad_acc_hooks: list[Any] = []
        for group, options in zip(self.groups, self.adamw.param_groups):
            group.allocate()
            options["params"] = [group.master]
            self.adamw.allocate(group.master, None if group.master is group.low_shard else group.low_shard)
        self.real_dp_process_group = [group.process_group for group in self.groups]
        self.bf16_groups = [[piece.param for piece in group.pieces] for group in self.groups]
        self.bf16_groups_flat = [group.low for group in self.groups]
        self.fp32_groups_flat_partition = [group.master for group in self.groups]
        self.fp32_groups_gradients = [[param.main_grad for param in params] for params in self.bf16_groups]
        self.fp32_groups_gradients_flat = [group.grad for group in self.groups]
        self.fp32_groups_gradient_flat_partition = [group.grad_shard for group in self.groups]
        self.fp32_groups_has_gradients = [[True] * len(params) for params in self.bf16_groups]

    @torch.no_grad()
    def step(self, lr: float) -> StepStats:  # type: ignore[override]
        """Norm, clip, AdamW, gather. The gradients' shards are final."""
        total = torch.stack([sum_of_squares(group.grad_shard) for group in self.groups]).sum()
        if self.grid.world_size > 1:
            dist.all_reduce(total, group=self.grid.group("world"))
        norm = total.sqrt().float()
        finite = torch.isfinite(norm)
        scale = torch.where(finite, torch.clamp(self.clip_grad / (norm + 1e-6), max=1.0), torch.nan)
        self.applied += finite
        self.skipped += ~finite
        self.adamw.step(lr, self.applied, scale)
        for group in self.groups:
            group.gather()
        return StepStats(norm, ~finite)

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Low-precision weights from the masters, on every rank."""
        for group in self.groups:
            if group.master is not group.low_shard:
                group.low_shard.copy_(group.master)
            group.gather()


class Engine(DeepSpeedEngine):
    """What the training loop holds. Call the model itself, never the engine: its forward would rescale gradients."""

    def __init__(self, model: nn.Module, grid: Grid, optim: OptimConfig, groups: list[FlatGroup]):
        self.grid, self.optim = grid, optim
        self.flat_groups = groups
        adamw = AdamW(
            [
                {"params": [p.param for p in group.pieces], "weight_decay": optim.weight_decay if group.decay else 0.0}
                for group in self.flat_groups
            ],
            optim.beta1,
            optim.beta2,
            optim.eps,
            {"bfloat16": torch.bfloat16, "float32": torch.float32}[optim.moment_dtype],
        )
        settings = _settings(optim)
        mpu = _Mpu(grid)
        super().__init__(
            args=None,
            model=model,
            optimizer=adamw,
            mpu=mpu,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
            dont_change_device=True,
        )
        assert type(self.optimizer) is ShardedOptimizer, type(self.optimizer)
        for hook in (self.module_forward_pre_hook, self.module_forward_post_hook):
            hook.remove()  # timers and profilers of DeepSpeed on every call of the model
        self._order = list(dict.fromkeys(group.chunk for group in groups))
        self._complete: set[int] = set()
        self._reducing: dict[int, list[dist.Work]] = {}
        self._writers: list[torch.cuda.Event] = []
        _require_same_weights(self.flat_groups, grid)

    # -- what DeepSpeed would do at start ----------------------------------------------------------------------------

    def _do_optimizer_sanity_check(self, basic_optimizer: AdamW) -> str:
        return "bf16"  # of its kinds, the one that goes to _configure_bf16_optimizer, whatever the parameters' format

    def _configure_bf16_optimizer(self, optimizer: AdamW) -> ShardedOptimizer:
        return ShardedOptimizer(optimizer, self.flat_groups, self.grid, self.optim.clip_norm, self.param_names)

    def _cast_module_mixed_precision(self, *args: Any) -> None:
        """Parameters keep the format they were built in."""

    def _broadcast_model(self) -> None:
        """Initial weights depend on seed and names only; `_require_same_weights` looks at the result."""

    # -- one step ----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before the first backward of a step."""
        assert not self._complete, "begin_step after reduce: finish the step first"
        for group in self.flat_groups:
            group.check_sealed()

    def reduce(self, chunk: int) -> None:
        """Declare the gradients of a chunk complete and start their reduction; the caller goes on computing.

        Reductions start from the highest chunk down, -1 (shared by several) last, on every rank: ranks that share
        parameters may complete them in different orders (DualPipe's twins), and a communicator wants one.
        """
        assert chunk not in self._complete, f"chunk {chunk} is reduced twice in one step"
        self._complete.add(chunk)
        for due in self._order[len(self._reducing) :]:
            if due not in self._complete:
                break
            mine = [group for group in self.flat_groups if group.chunk == due]
            for group in mine:
                group.seal()
            self._reducing[due] = [work for group in mine if (work := group.reduce()) is not None]

    def finish_step(self, lr: float) -> StepStats:
        """Reduce what `reduce` was not called for, clip and step. All ranks get the same norm and the same skip."""
        for chunk in self._order:
            if chunk not in self._complete:
                self.reduce(chunk)
        for works in self._reducing.values():
            for work in works:
                work.wait()
        self._reducing.clear()
        self._complete.clear()
        for group in self.flat_groups:
            group.check_sealed()
        for event in self._writers:
            event.wait()  # the stream waits, not the host
        self._writers.clear()
        return self.optimizer.step(lr)

    def hold(self, event: torch.cuda.Event) -> None:
        """Let the next step change masters and moments only after `event`: someone copies them on another stream."""
        self._writers.append(event)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as backward and step are."""
        raise AssertionError("call the model, Tensor.backward and finish_step: DeepSpeed's own path rescales gradients")

    backward = step = forward

    # -- state -------------------------------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """This rank's share of masters and moments, as views under global names. Over all ranks each element once."""
        states = [self.optimizer.adamw.state[group.master] for group in self.flat_groups]
        found = [
            g.fragments(i, s["exp_avg"], s["exp_avg_sq"]) for i, (g, s) in enumerate(zip(self.flat_groups, states))
        ]
        return [fragment for group in found for fragment in group]

    def masters(self) -> list[Tensor]:
        """This rank's flat FP32 partitions, by group."""
        return [group.master for group in self.flat_groups]

    def refresh_weights(self) -> None:
        """The model's weights from the masters, after these were loaded."""
        self.optimizer.update_lp_params()

    def counters(self) -> dict[str, int]:
        """Steps that moved the weights and steps skipped. Waits for the device."""
        return {"applied_steps": int(self.optimizer.applied), "skipped_steps": int(self.optimizer.skipped)}

    def set_counters(self, applied_steps: int, skipped_steps: int) -> None:
        """The inverse of `counters`; applied_steps is AdamW's step number."""
        self.optimizer.applied.fill_(applied_steps)
        self.optimizer.skipped.fill_(skipped_steps)

    def release(self) -> None:
        """Give back gradients, masters and moments; the model keeps its weights and is plain again. No step follows."""
        for group in self.flat_groups:
            for piece in group.pieces:
                del piece.param.main_grad, piece.param.grad_ready
        self.flat_groups = []
        del self.optimizer, self.basic_optimizer, self.client_optimizer


def build_engine(
    model: nn.Module,
    cfg: Config,
    grid: Grid,
    chunk_of: Callable[[str], int] = lambda name: 0,
    owner: Callable[[str], str] = owner_of,
) -> Engine:
    """The engine of a model whose parameters are final: their storage moves into flat buffers.

    chunk_of, owner: see flat_groups. Afterwards each parameter has `main_grad` and `grad_ready`. Raises AssertionError
    where ranks that share parameters do not hold the same ones.
    """
    deepspeed_groups._release_process_group_references()  # of an earlier engine in this process
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    return Engine(model, grid, cfg.optim, flat_groups(model, grid, chunk_of, owner))


def _settings(optim: OptimConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # unread: batches never pass through DeepSpeed
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "sum",
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": optim.clip_norm,
    }


def _require_same_weights(groups: list[FlatGroup], grid: Grid) -> None:
    """Ranks of one process group hold the same names, shapes and weight bits, in the same order."""
    if grid.world_size == 1:
        return
    mine: list[Any] = []
    for group in groups:
        bits = group.low.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[group.low.element_size()])
        pieces = [[piece.name, list(piece.shape), piece.base] for piece in group.pieces]
        mine.append([dist.get_process_group_ranks(group.process_group), pieces, int(bits.sum(dtype=torch.int64))])
    everyone = grid.gather(mine)
    for ranks, pieces, checksum in mine:
        for rank in ranks:
            alike = [theirs for theirs in everyone[rank] if theirs[:2] == [ranks, pieces]]
            if [ranks, pieces, checksum] not in alike:
                what = "initial weights" if alike else "parameters"
                raise AssertionError(f"ranks {grid.rank} and {rank} share {pieces[0][0]} but hold different {what}")
