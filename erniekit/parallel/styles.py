"""Who holds what of every parameter when tensors are cut, by its name: the table of tensor parallelism.

    column      cut along its outputs: the ranks' results are parts, of heads, of a width, of the vocabulary
    row         cut along its inputs: the ranks' results are partial sums
    vocabulary  the embedding, cut by tokens
    whole       every rank has all of it

A module's adapters follow its style: of a column A is whole and B is cut, of a row A is cut and B is whole. How large a
part is, config/cut.py says. A name that no row matches is our mistake: a new parameter needs a row. Plain: no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout

Kind = Literal["column", "row", "vocabulary", "whole"]
Unit = Literal["heads", "kv_heads", "width", "halves", "vocabulary", ""]


class Style(NamedTuple):
    """How the parameters of a module are cut, and into what."""

    kind: Kind
    unit: Unit = ""
    experts: bool = False  # routed experts, stacked in the first dimension
    sees: Literal["all", "positions", "routed"] = "all"  # with sequence parallelism, what is whole (modules, and the
    # biases behind a row's sum) works on a part of the positions; in a mixture of experts it does if experts are shared
    # by the tensor ranks, else on all of them (parallel/tensor.py)


_BLOCK = r"model\.(layers|mtp_block)\.\d+\."
_TABLE: tuple[tuple[str, Style], ...] = (
    (_BLOCK + r"self_attn\.q_proj", Style("column", "heads")),
    (_BLOCK + r"self_attn\.[kv]_proj", Style("column", "kv_heads")),
    (_BLOCK + r"self_attn\.o_proj", Style("row", "heads", sees="positions")),
    (_BLOCK + r"mlp\.(shared_experts\.)?(gate|up)_proj", Style("column", "width")),
    (_BLOCK + r"mlp\.down_proj", Style("row", "width", sees="positions")),
    (_BLOCK + r"mlp\.shared_experts\.down_proj", Style("row", "width", sees="routed")),
    (_BLOCK + r"mlp\.experts\.gate_up", Style("column", "halves", experts=True)),
    (_BLOCK + r"mlp\.experts\.down", Style("row", "width", experts=True)),
    (_BLOCK + r"mlp\.(gate|moe_statics)", Style("whole", sees="routed")),
    (_BLOCK + r"(input|post_attention)_layernorm", Style("whole", sees="positions")),
    (r"model\.norm", Style("whole", sees="positions")),
    (r"model\.mtp_(emb_norm|hidden_norm|linear_proj)\.\d+", Style("whole", sees="positions")),
    (r"model\.embed_tokens", Style("vocabulary", "vocabulary")),
    (r"lm_head", Style("column", "vocabulary")),
    (r"score", Style("whole")),
)
# What follows a module's name, and the dimension that a column and a row cut of it (None: none).
_OWN = {"weight": (-1, -2), "bias": (-1, None)}
_ADAPTER = {
    "lora_A": (None, -2), "lora_B": (-1, None), "magnitude": (-1, None), "initial_A": (None, -2),
    "initial_B": (-1, None),
}  # fmt: skip
_STACKED = {"_proj": (-1, -2)}


_ROUTED_EXPERTS = ".mlp.experts."
_ROUTER = (".mlp.gate.weight", ".e_score_correction_bias")


def is_of_routed_experts(name: str) -> bool:
    """Whether a parameter belongs to routed experts, of which other ranks have copies than of the rest."""
    return _ROUTED_EXPERTS in name


def comes_and_goes(name: str, *, num_dims: int) -> bool:
    """Whether a parameter of a decoder layer is whole only while the layer computes, at sharding stage 3. Matrices are:
    norms, biases and routers are small, and routers are read outside their layer, too."""
    return num_dims > 1 and not name.endswith(_ROUTER)


class Slot(NamedTuple):
    """A parameter: its module's style, the dimension that is cut, and whether it belongs to an adapter."""

    style: Style
    dim: int | None
    adapter: bool


def slot_of(name: str) -> Slot:
    """What the table says of a parameter, by its name in memory."""
    for pattern, style in _TABLE:
        matched = re.match(pattern + r"(?P<rest>(\.|_proj$|_adapter\.).*)$", name)
        if matched:
            return _slot(name, style, matched["rest"])
    raise AssertionError(f"{name}: no row of the table of tensor parallelism matches it")


def _slot(name: str, style: Style, rest: str) -> Slot:
    adapter = "adapter." in rest
    own = rest.rpartition(".")[2]
    if style.kind == "vocabulary":
        return Slot(style, 0, adapter)
    table = _ADAPTER if adapter else _STACKED if style.experts else _OWN
    if style.kind == "whole":
        return Slot(style, None, adapter)
    assert own in table, f"{name}: the table of tensor parallelism does not know {own!r}"
    return Slot(style, table[own][0 if style.kind == "column" else 1], adapter)


def holders(name: str, layout: Layout, arch: ErnieConfig) -> list[list[int]]:
    """Tensor ranks in groups that hold the same numbers of a parameter; all of them once."""
    slot, ranks = slot_of(name), layout.tensor
    if (slot.style.experts and layout.experts_over == "tensor") or _cut_apart(slot, layout):
        copies = ranks // arch.num_key_value_heads if slot.style.unit == "kv_heads" else 1
        return [list(range(start, start + max(copies, 1))) for start in range(0, ranks, max(copies, 1))]
    return [list(range(ranks))]


def _cut_apart(slot: Slot, layout: Layout) -> bool:
    return slot.dim is not None and layout.tensor > 1


def partial_over_tensor(names: Iterable[str], layout: Layout, arch: ErnieConfig) -> list[str]:
    """The parameters of which several tensor ranks hold the same (`holders`) while each computes but a part of the
    gradient: these parts must be added up."""
    return [name for name in names if layout.tensor > 1 and _partial(slot_of(name), layout, arch)]


def _partial(slot: Slot, layout: Layout, arch: ErnieConfig) -> bool:
    style = slot.style
    over_data = layout.experts_over == "data"
    if style.experts and not over_data:
        return False  # whole experts, each in one place
    if slot.dim is not None:
        return style.unit == "kv_heads" and arch.num_key_value_heads < layout.tensor
    if slot.adapter and style.kind != "whole":
        return True  # a whole factor beside a cut one
    sees_a_part = style.sees == "positions" or (style.sees == "routed" and not over_data)
    return layout.sequence_parallel and sees_a_part


def held_ranges(name: str, shape: tuple[int, ...], cut: Cut, arch: ErnieConfig) -> tuple[int | None, list[slice]]:
    """(The dimension in which a rank holds a part of a whole parameter of `shape`, its ranges there); of the stack of
    routed experts, within the experts that it holds."""
    slot = slot_of(name)
    style, dim = slot.style, slot.dim
    if dim is None or (style.experts and cut.layout.experts_over == "tensor"):
        return None, []
    size = shape[dim]
    if style.unit == "halves":
        half = cut.part(size // 2)
        return dim, [half, slice(half.start + size // 2, half.stop + size // 2)]
    if style.unit == "kv_heads":
        each = size // arch.num_key_value_heads
        held = cut.kv_heads(arch.num_key_value_heads)
        return dim, [slice(held.start * each, held.stop * each)]
    return dim, [cut.part(size)]
