"""The one name table between our state and Hugging Face's DeepSeek-V3 format, as data; import reads it backwards.

A row pairs one tensor of ours with the tensors it is cut into: one set per expert where their names hold ``{e}``, and
within a set equal shares of the rows (gate above up). Rows that only carry a name over have one target. Row orders and
rotary pairs are the same on both sides (interleaved), so nothing is permuted. The expanded list holds only names that
the model has; a name of ours that no row covers is an error of this file.

MTP module k is written as layer L + k, L the number of main layers, with copies of embedding and head beside it as the
released checkpoint has them: some readers load the copies, the others share the main ones.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class Row(NamedTuple):
    """One tensor of ours and the names it becomes, both below a prefix; ``{e}`` stands for the expert."""

    ours: str
    theirs: tuple[str, ...]


def _same(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name, (name,)) for name in names)


FIRST = (Row("embed_tokens.weight", ("model.embed_tokens.weight",)),)
LAST = (Row("norm.weight", ("model.norm.weight",)), Row("lm_head.weight", ("lm_head.weight",)))
BLOCK = (
    *_same("input_layernorm.weight"),
    *_same("self_attn.q_proj.weight"),
    *_same("self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"),
    *_same("self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight"),
    *_same("self_attn.o_proj.weight", "post_attention_layernorm.weight"),
    Row("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    *_same("mlp.down_proj.weight", "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    Row(
        "mlp.shared_experts.gate_up_proj.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    ),
    *_same("mlp.shared_experts.down_proj.weight"),
    Row("mlp.experts.gate_up_proj.weight", ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight")),
    Row("mlp.experts.down_proj.weight", ("mlp.experts.{e}.down_proj.weight",)),
)
MTP = (*_same("enorm.weight", "hnorm.weight", "eh_proj.weight"), Row("norm.weight", ("shared_head.norm.weight",)))
MTP_COPIES = (
    Row("embed_tokens.weight", ("embed_tokens.weight",)),
    Row("lm_head.weight", ("shared_head.head.weight",)),
)
BIAS_SUFFIX = "e_score_correction_bias"


class Entry(NamedTuple):
    """One tensor of theirs and where it lies in ours.

    name: theirs, in full. ours: our tensor's global name. expert: its index in the leading dimension, None if there is
    none. part, parts: which equal share of the rows. layer: their layer index, -1 before and after the layers.
    copy: a second copy of a tensor that another entry already carries. shape: of their tensor.
    """

    name: str
    ours: str
    expert: int | None
    part: int
    parts: int
    layer: int
    copy: bool
    shape: tuple[int, ...]


def entries(shapes: Mapping[str, Sequence[int]], num_hidden_layers: int) -> list[Entry]:
    """Expand the table for a model, in file order: embedding, layers, final norm and head, MTP layers.

    shapes: every tensor of our state (parameters and router biases) by global name. An expert's tensors are neighbours.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("mtp.")), default=-1)
    out = _rows(FIRST, "", "", -1, shapes)
    for i in range(num_hidden_layers):
        out += _rows(BLOCK, f"layers.{i}.", f"model.layers.{i}.", i, shapes)
    out += _rows(LAST, "", "", -1, shapes)
    for k in range(depth):
        layer = num_hidden_layers + k
        theirs = f"model.layers.{layer}."
        out += [entry._replace(copy=True) for entry in _rows(MTP_COPIES, "", theirs, layer, shapes)]
        out += _rows(MTP, f"mtp.{k}.", theirs, layer, shapes)
        out += _rows(BLOCK, f"mtp.{k}.block.", theirs, layer, shapes)
    uncovered = set(shapes) - {entry.ours for entry in out}
    assert not uncovered, f"no row of the name table covers {sorted(uncovered)}"
    return out


def _rows(rows: Sequence[Row], ours: str, theirs: str, layer: int, shapes: Mapping) -> list[Entry]:
    """The entries of `rows` below two prefixes; per-expert rows together at the end, expert by expert."""
    plain: list[Entry] = []
    experts: list[Entry] = []
    for row in rows:
        shape = shapes.get(ours + row.ours)
        if shape is None:
            continue
        parts = len(row.theirs)
        stacked = "{e}" in row.theirs[0]
        shape = tuple(shape[1:] if stacked else shape)
        assert shape[0] % parts == 0, f"{ours + row.ours}: {shape[0]} rows do not split into {parts} equal parts"
        shape = (shape[0] // parts, *shape[1:])
        for expert in range(shapes[ours + row.ours][0]) if stacked else (None,):
            for part, name in enumerate(row.theirs):
                name = theirs + name.replace("{e}", str(expert))
                entry = Entry(name, ours + row.ours, expert, part, parts, layer, False, shape)
                (experts if stacked else plain).append(entry)
    return plain + sorted(experts, key=lambda entry: entry.expert or 0)


def share(tensor: Tensor, entry: Entry) -> Tensor:
    """The view of our tensor, or of its expert's slice, that is their tensor `entry`; copy into it to import."""
    rows = tensor.shape[0] // entry.parts
    return tensor.narrow(0, entry.part * rows, rows)
