"""A small model for optimizer and checkpoint tests, its training on N ranks, and the same training written plainly.

The model has what the engine tells apart: matrices, gains, expert tensors, a parameter no input reaches, a buffer that
is state and one that is not; odd sizes, so that shards cut through parameters. Its gradients follow the main_grad rule.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepv3.config.schema import Config
from deepv3.dist import Grid, init_distributed
from deepv3.kernels.reference import adamw as plain
from deepv3.optim.engine import Engine, build_engine

WIDTH, EXPERTS = 13, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def to_main_grad(param: nn.Parameter) -> None:
    """Move a fresh .grad to main_grad: stored at the first touch of a step, added later."""
    if getattr(param, "main_grad", None) is None:
        return
    if param.grad_ready:
        param.main_grad.add_(param.grad)
    else:
        param.main_grad.copy_(param.grad)
    param.grad_ready = True
    param.grad = None


class Experts(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.up = nn.Linear(1, 1, bias=False)
        self.up.weight = nn.Parameter(torch.empty(count, 7, WIDTH))


class Net(nn.Module):
    """Tokens [n, WIDTH] -> a sum of squares. ep_size > 1: with a share of the experts, for state, not for training."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, ep_size: int = 1):
        super().__init__()
        self.first = nn.Linear(WIDTH, 37, bias=False)
        self.norm = nn.RMSNorm(37)
        self.second = nn.Linear(37, WIDTH, bias=False)
        self.mlp = nn.ModuleDict({"experts": Experts(EXPERTS // ep_size)})
        self.unused = nn.Linear(5, 5, bias=False)
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("table", torch.ones(3), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for param in self.parameters():
            fresh = torch.randn(param.shape, generator=generator) * 0.3 + (param.ndim == 1)
            param.data = fresh.to(dtype)
            param.register_post_accumulate_grad_hook(to_main_grad)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.norm(self.first(x)))
        weight = self.mlp["experts"].up.weight
        routed = torch.einsum("nw,eiw->nei", x, weight).tanh().mean((1, 2), keepdim=True)[:, :, 0]
        return (hidden * (1 + routed) - 1).float().square().sum()


def config(precision: str = "bf16", moments: str = "bfloat16", **optim) -> Config:
    """A config for the stand-in: constant rate, clipping that acts."""
    cfg = Config(seed=3)
    cfg.precision.name = precision
    cfg.optim.moment_dtype = moments
    cfg.optim.clip_norm = 0.5
    for name, value in optim.items():
        setattr(cfg.optim, name, value)
    return cfg


def sample(step: int, number: int, dtype: torch.dtype) -> Tensor:
    """Sequence `number` of step `step`: the same on every layout."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(3, WIDTH, generator=generator).to(dtype)


BATCH = 8
LR = 1e-2


@dataclass
class Trained:
    """A rank with its engine, and what happened so far."""

    cfg: Config
    grid: Grid
    model: Net
    engine: Engine
    norms: list[float] = field(default_factory=list)
    skips: list[bool] = field(default_factory=list)

    def step(self, number: int, poison: int | None = None, early: bool = False) -> None:
        """One optimizer step. poison: the data rank whose gradient becomes NaN; early: reduce before finish_step."""
        self.engine.begin_step()
        for n in range(self.grid.dp_rank, BATCH, self.grid.dp_size):
            loss = self.model(sample(number, n, self.model.first.weight.dtype))
            (loss / BATCH * (torch.nan if poison == self.grid.dp_rank else 1.0)).backward()
        if early:
            self.engine.reduce(0)
        stats = self.engine.finish_step(LR)
        self.norms.append(stats.norm.item())
        self.skips.append(bool(stats.skipped))

    def state(self) -> dict[str, dict[int, dict[str, Tensor]]]:
        """{name: {first element: {kind: values}}} of this rank's fragments, cloned."""
        found: dict[str, dict[int, dict[str, Tensor]]] = {}
        for f in self.engine.fragments():
            kinds = {"master": f.master, "exp_avg": f.exp_avg, "exp_avg_sq": f.exp_avg_sq}
            found.setdefault(f.name, {})[f.lo] = {kind: t.clone() for kind, t in kinds.items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters, cloned."""
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}


def start(cfg: Config, seed: int = 0, ep_size: int = 1) -> Trained:
    """Join the world and build the stand-in with its engine."""
    grid = init_distributed(cfg)
    model = Net(seed, DTYPES[cfg.precision.name], ep_size)
    return Trained(cfg, grid, model, build_engine(model, cfg, grid))


def whole(states: list[dict]) -> dict[str, dict[str, Tensor]]:
    """Parameters put together from all ranks' `state()`: {name: {kind: flat values}}."""
    merged: dict[str, dict[int, dict[str, Tensor]]] = {}
    for state in states:
        for name, pieces in state.items():
            assert not merged.get(name, {}).keys() & pieces.keys(), f"{name} has an element with two owners"
            merged.setdefault(name, {}).update(pieces)
    return {
        name: {kind: torch.cat([pieces[lo][kind] for lo in sorted(pieces)]) for kind in pieces[min(pieces)]}
        for name, pieces in merged.items()
    }


def same(a: dict, b: dict) -> bool:
    """Whether two nested dictionaries of tensors are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def reference(
    cfg: Config, steps: int, replicas: int, omit: int | None = None
) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """The same training with plain tensors, gradients summed as `replicas` data ranks sum them. Returns state, norms.

    omit: a step whose data is passed over.
    """
    model = Net(0, DTYPES[cfg.precision.name])
    params = dict(model.named_parameters())
    moments = {"bfloat16": torch.bfloat16, "float32": torch.float32}[cfg.optim.moment_dtype]
    master = {name: p.detach().float().flatten().clone() for name, p in params.items()}
    first, second = ({name: torch.zeros_like(m, dtype=moments) for name, m in master.items()} for _ in range(2))
    norms = []
    for count, step in enumerate((s for s in range(1, steps + 1) if s != omit), start=1):
        totals = {name: torch.zeros_like(m) for name, m in master.items()}
        for replica in range(replicas):
            own = {name: torch.zeros_like(m) for name, m in master.items()}
            for n in range(replica, BATCH, replicas):
                used = {name: p for name, p in params.items() if not name.startswith("unused")}
                loss = model(sample(step, n, model.first.weight.dtype)) / BATCH
                for name, grad in zip(used, torch.autograd.grad(loss, list(used.values()))):
                    own[name] += grad.flatten()
            for name in totals:
                totals[name] += own[name]
        norm = torch.stack([t.double().square().sum() for t in totals.values()]).sum().sqrt().float()
        norms.append(norm.item())
        scale = torch.clamp(cfg.optim.clip_norm / (norm + 1e-6), max=1.0)
        for name, param in params.items():
            decay = cfg.optim.weight_decay if param.ndim > 1 else 0.0
            options = (LR, cfg.optim.beta1, cfg.optim.beta2, cfg.optim.eps, decay, count, scale)
            plain.adamw_(master[name], totals[name], first[name], second[name], None, *options)
            param.data = master[name].view(param.shape).to(param.dtype)
    state = {n: {"master": master[n], "exp_avg": first[n], "exp_avg_sq": second[n]} for n in master}
    return state, norms
