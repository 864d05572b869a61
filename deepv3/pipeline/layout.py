"""Which layers, and whether embedding, head and MTP modules, live in which pipeline stage.

The first stage has the embedding; the last has the final norm, the head and the MTP modules, which chain on the last
hidden state and share embedding and head (V3 2.2). In DualPipeV both are on rank 0, in DualPipe on rank 0 and again on
rank PP-1, so that embedding, head and MTP share parameters and gradients in place (V3 3.2.3); ``embedding_ranks`` says
where else a second copy of the embedding must be kept equal.

The report does not say how its 61 layers fall on 16 stages. Here every layer weighs 1, the head and an MTP module what
their matrices weigh against those of a layer, and layers go one by one to the stage that then weighs least, which
makes the heaviest stage as light as whole layers allow. Attention scores and the embedding's look-up are left out of
the weights. A layout text overrides it:

    layout = stage { "|" stage }
    stage  = [ "E" ] [ layers ] [ "H" ] [ "M" ]  or  "..."

E embedding, layers a whole number of layers (none is 0), H norm and head, M all MTP modules; "..." once, for as many
copies of the stage before it as the pipeline still lacks (none too). E stands in the first stage, H in the last, M in
the last exactly if the model has MTP modules. ``E4|4|...|1HM`` puts 61 layers on 16 stages. Only the first and the last
stage may have no layers.
"""

import heapq
import re
from dataclasses import dataclass

from deepv3.config.schema import ModelConfig
from deepv3.errors import ConfigError
from deepv3.pipeline.schedule import Schedule

_STAGE = re.compile(r"(E?)(\d*)(H?)(M?)")


@dataclass(frozen=True)
class StageSpec:
    """What a stage is made of. layers: global indices of main layers. mtp: number of MTP modules, 0 but in the last."""

    layers: range
    embedding: bool = False
    head: bool = False
    mtp: int = 0

    def __str__(self) -> str:
        count = str(len(self.layers)) if self.layers else ""
        return f"{'E' * self.embedding}{count}{'H' * self.head}{'M' * (self.mtp > 0)}" or "0"


def weights(model: ModelConfig) -> tuple[float, float]:
    """(head, one MTP module with its own use of the head) in layers, by multiplied parameters per token.

    A dense layer counts as an expert layer: in V3 both feed-forwards multiply 396 M parameters per token.
    """
    width, heads = model.hidden_size, model.num_attention_heads
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    q_proj = width * query if model.q_lora_rank is None else model.q_lora_rank * (width + query)
    kv_proj = width * (model.kv_lora_rank + model.qk_rope_head_dim)
    kv_proj += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    active = model.num_experts_per_tok + model.n_shared_experts
    experts = 3 * width * model.moe_intermediate_size * active + width * model.n_routed_experts
    layer = q_proj + kv_proj + heads * model.v_head_dim * width + experts
    head = model.vocab_size * width / layer
    return head, 1 + 2 * width * width / layer + head


def split(layers: int, stages: int, last: float = 0.0) -> list[int]:
    """Layers per stage, at least 1 each. last: what the last stage carries besides, in layers. Ties go to late stages.

    Late, because an early stage of 1F1B keeps more micro-batches' activations than a late one.
    """
    counts = [1] * stages
    heap = [(1.0 + (last if stage == stages - 1 else 0.0), -stage) for stage in range(stages)]
    heapq.heapify(heap)
    for _ in range(layers - stages):
        weight, negative = heapq.heappop(heap)
        counts[-negative] += 1
        heapq.heappush(heap, (weight + 1.0, negative))
    return counts


def _read(layout: str, stages: int) -> list[tuple[bool, int, bool, bool]]:
    """The stages of a layout text as (E, layers, H, M)."""
    texts = layout.replace(" ", "").split("|")
    if "..." in texts:
        at = texts.index("...")
        lacking = stages - (len(texts) - 1)
        if at == 0 or texts.count("...") > 1 or lacking < 0:
            raise ConfigError(
                f"parallel.layout={layout}: '...' stands once, after a stage, for the stages that lack; the pipeline "
                f"has {stages}, the text names {len(texts) - texts.count('...')}"
            )
        texts[at : at + 1] = [texts[at - 1]] * lacking
    if len(texts) != stages:
        raise ConfigError(
            f"parallel.layout={layout} has {len(texts)} stages, the pipeline has {stages} (dualpipev: 2 x "
            "parallel.pp_size, else parallel.pp_size)"
        )
    found = []
    for text in texts:
        match = _STAGE.fullmatch(text)
        if match is None or not text:
            raise ConfigError(f"parallel.layout={layout}: '{text}' is no stage; stages read like E4, 4, 3HM or 0")
        embedding, count, head, mtp = match.groups()
        found.append((bool(embedding), int(count or 0), bool(head), bool(mtp)))
    return found


def _check_layout(layout: str, read: list[tuple[bool, int, bool, bool]], model: ModelConfig) -> None:
    total = sum(count for _, count, _, _ in read)
    if total != model.num_hidden_layers:
        raise ConfigError(
            f"parallel.layout={layout} places {total} layers, model.num_hidden_layers={model.num_hidden_layers}"
        )
    last = len(read) - 1
    for number, (embedding, count, head, mtp) in enumerate(read):
        here = f"parallel.layout={layout}, stage {number}"
        if embedding != (number == 0) or head != (number == last):
            raise ConfigError(f"{here}: E belongs in stage 0 and H in stage {last}, there and nowhere else")
        if mtp != (number == last and model.num_nextn_predict_layers > 0):
            raise ConfigError(
                f"{here}: M belongs in stage {last} if model.num_nextn_predict_layers > 0, which is "
                f"{model.num_nextn_predict_layers}"
            )
        if not count and 0 < number < last:
            raise ConfigError(f"{here} has no layers; only the first and the last stage may be without")


def place(model: ModelConfig, stages: int, layout: str = "") -> tuple[StageSpec, ...]:
    """The stages of a model, in the model's order.

    stages: S of the schedule. layout: text that overrides the automatic split. Raises ConfigError for more stages than
    layers and for a layout that does not fit.
    """
    layers, depth = model.num_hidden_layers, model.num_nextn_predict_layers
    if layout:
        read = _read(layout, stages)
        _check_layout(layout, read, model)
        counts = [count for _, count, _, _ in read]
    else:
        if stages > layers:
            raise ConfigError(
                f"{stages} pipeline stages > model.num_hidden_layers={layers}: every stage needs a layer; lower "
                "parallel.pp_size (dualpipev has 2 x parallel.pp_size stages) or give parallel.layout"
            )
        head, mtp = weights(model)
        counts = split(layers, stages, head + depth * mtp)
    specs, first = [], 0
    for stage, count in enumerate(counts):
        last = stage == stages - 1
        specs.append(StageSpec(range(first, first + count), stage == 0, last, depth if last else 0))
        first += count
    return tuple(specs)


def format_layout(specs: tuple[StageSpec, ...]) -> str:
    """The layout text of stages, without '...'."""
    return "|".join(map(str, specs))


def embedding_ranks(schedule: Schedule, specs: tuple[StageSpec, ...]) -> tuple[int, ...]:
    """Pipeline ranks that hold the embedding, ascending: they have its stage, or MTP modules, which embed tokens too.

    More than one means copies whose gradients must be summed: rank 0 and the last rank of 1F1B and ZB1P with MTP, the
    two ends of DualPipe. One rank never holds two.
    """
    return tuple(
        sorted({route[stage] for route in schedule.routes for stage, s in enumerate(specs) if s.embedding or s.mtp})
    )
