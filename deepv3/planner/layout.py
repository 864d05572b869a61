"""A run laid out on a cluster: what every estimate starts from.

`Layout.of` reads a configuration; the fields are what a search varies. Nothing is estimated here, but what the cluster
makes impossible is refused, with the knob that mends it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

from deepv3.arithmetic import Block, block
from deepv3.config.schema import Config, ModelConfig
from deepv3.errors import ConfigError
from deepv3.pipeline.interleaved import interleaved
from deepv3.pipeline.layout import StageSpec, place
from deepv3.pipeline.schedule import Schedule, make_schedule
from deepv3.planner.hardware import Cluster, cluster_of

FOREIGN: dict[str, Callable[..., Schedule]] = {
    "interleaved": interleaved,
    "interleaved_pairs": partial(interleaved, paired=True),
}
"""Schedules of others' runs, which no configuration can ask for."""


@lru_cache(maxsize=64)
def schedule_of(name: str, pp_size: int, micro_batches: int, virtual: int = 1) -> Schedule:
    """`make_schedule`, remembered: a search asks for the same lists many times. virtual: stages per rank if FOREIGN."""
    if name in FOREIGN:
        return FOREIGN[name](pp_size, micro_batches, virtual)
    return make_schedule(name, pp_size, micro_batches)


@dataclass(frozen=True)
class Layout:
    """The rank grid, formats and batch of one plan. batch: sequences per step; micro: sequences per micro-batch.

    The last three say how others' software differs from ours. virtual: stages per rank, of an interleaved schedule.
    wire: format in which tokens are dispatched; that of `precision` if empty. gradient_bytes: of a summed gradient.
    """

    m: ModelConfig
    cluster: Cluster
    pp: int
    ep: int
    schedule: str
    precision: str
    recompute: str
    moment_bytes: int
    seq_len: int
    micro: int
    batch: int
    loss_chunk: int
    split: str = ""  # parallel.layout, layers per stage as text
    shares_memory: bool = False  # parallel.dispatcher = symmetric
    cuda_graph: bool = False  # unless train.cuda_graph is false
    virtual: int = 1
    wire: str = ""
    gradient_bytes: int = 4

    @classmethod
    def of(cls, cfg: Config) -> "Layout":
        """The layout of a validated configuration, at its full batch. Raises ConfigError."""
        parallel, train = cfg.parallel, cfg.train
        full = train.global_batch_size or (train.batch_ramp.end if train.batch_ramp else 0)
        return cls(
            m=cfg.model,
            cluster=cluster_of(cfg.cluster),
            pp=parallel.pp_size,
            ep=parallel.ep_size,
            schedule=parallel.schedule,
            precision=cfg.precision.name,
            recompute=train.recompute,
            moment_bytes=2 if cfg.optim.moment_dtype == "bfloat16" else 4,
            seq_len=cfg.data.seq_len,
            micro=train.micro_batch_size,
            batch=full,
            loss_chunk=train.loss_chunk,
            split=parallel.layout,
            shares_memory=parallel.dispatcher == "symmetric",
            cuda_graph=train.cuda_graph is not False,
        )

    @property
    def dp(self) -> int:
        """Data-parallel ranks of a stage."""
        return self.cluster.count // self.pp

    @property
    def micro_batches(self) -> int:
        """Of one pipeline and step."""
        return self.batch // (self.dp * self.micro)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro * self.seq_len

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.pp * (2 if self.schedule == "dualpipev" else self.virtual)

    @property
    def replayed(self) -> bool:
        """Whether micro-batches are CUDA graphs: not refused, and the whole model on one device, as in training."""
        return self.cuda_graph and self.stages == self.ep == 1

    @property
    def sends(self) -> str:
        """The format in which tokens are dispatched."""
        return self.wire or self.precision

    @cached_property
    def specs(self) -> tuple[StageSpec, ...]:
        """What lives in which stage; the split that training uses."""
        return place(self.m, self.stages, self.split)

    def lists(self, micro_batches: int | None = None) -> Schedule:
        """The action lists that training runs."""
        count = self.micro_batches if micro_batches is None else micro_batches
        return schedule_of(self.schedule, self.pp, count, self.virtual)

    def copies(self) -> int:
        """Ranks that hold the same weights beyond data parallelism: DualPipe's mirrors share each stage."""
        return 2 if self.lists(2 * self.pp).name == "dualpipe" else 1

    def held(self, rank: int) -> Iterator[tuple[int, StageSpec]]:
        """(number, stage) of the stages that a pipeline rank holds."""
        for stage in self.lists(2 * self.pp).chunks(rank):
            yield stage, self.specs[stage]

    @cached_property
    def _block(self) -> Block:
        return block(self.m)

    def stage_parameters(self, spec: StageSpec) -> tuple[int, int]:
        """(parameters that every data rank holds, expert parameters of one rank) of a stage."""
        m, b = self.m, self._block
        dense = sum(index < m.first_k_dense_replace for index in spec.layers)
        moe = len(spec.layers) - dense + spec.mtp
        shared = (dense + moe) * (b.attention + b.norms) + dense * b.dense + moe * (b.router + b.shared)
        shared += (spec.embedding + spec.head) * m.vocab_size * m.hidden_size + spec.head * m.hidden_size
        shared += spec.mtp * (2 * m.hidden_size**2 + 3 * m.hidden_size)
        # The DualPipes have first and last stage on one rank; elsewhere MTP keeps a second embedding on the last.
        if spec.mtp and not spec.embedding and not self.schedule.startswith("dualpipe") and self.pp > 1:
            shared += m.vocab_size * m.hidden_size
        return shared, moe * m.n_routed_experts // self.ep * b.expert

    def fp8_parameters(self, rank: int) -> int:
        """Of those that a pipeline rank holds, those whose products are FP8 in the FP8 recipe."""
        m, held = self.m, [spec for _, spec in self.held(rank)]
        other = 0
        for spec in held:
            layers = len(spec.layers) + spec.mtp
            other += (spec.embedding + spec.head) * m.vocab_size * m.hidden_size
            other += layers * m.n_routed_experts * m.hidden_size + spec.mtp * 2 * m.hidden_size**2
        return max(0, sum(sum(self.stage_parameters(spec)) for spec in held) - other)

    def refuse_impossible(self) -> None:
        """Raise ConfigError for what no rank grid of this cluster can run."""
        unit = self.dp * self.micro
        if self.cluster.count % self.pp or self.dp % self.ep:
            raise ConfigError(
                f"cluster.devices = {self.cluster.count} is no multiple of parallel.pp_size x parallel.ep_size = "
                f"{self.pp} x {self.ep}; take one, or other sizes of the grid"
            )
        if self.m.n_routed_experts % self.ep:
            raise ConfigError(
                f"model.n_routed_experts = {self.m.n_routed_experts} is not divisible by parallel.ep_size = {self.ep}; "
                "take a divisor"
            )
        if self.batch % unit:
            raise ConfigError(
                f"the batch of {self.batch} sequences is not divisible by dp x train.micro_batch_size = {self.dp} x "
                f"{self.micro} = {unit}; set train.global_batch_size={max(unit, self.batch // unit * unit)}"
            )
