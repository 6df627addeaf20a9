"""The ERNIE 4.5 map: for each layout, which tensors exist and where every atom of the model lies in them.

An *atom* is the finest piece of a model, named by its -PT name and seen [out, in]: experts, q, k, v, gate and up apart.
A *layout* is one way to store atoms in tensors:

    pt      what transformers reads: one tensor per atom
    paddle  what ERNIEKit reads: `ernie.` names, [in, out], q|k|v and gate|up fused on the out axis
    ram     the parameters of our own model: -PT names, [in, out], experts stacked

`layout_table` is that map; reading, writing and converting are walks over it. What config.json leaves open is a `Form`,
told by the tensors that are there. The facts are in docs/checkpoints.md. Knows no files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.keys import View, columns, expert, head_triplets, split_heads, transposed, whole
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut, size
from erniekit.config.sizes import VisionSizes, expert_groups

DISK_LAYOUTS = ("pt", "paddle")
EMBEDDING, HEAD, HEAD_BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
SCORE = "score.weight"  # the head of a reward model, as transformers' sequence classification names it
CORRECTION_BIAS = "moe_statics.e_score_correction_bias"
_MTP = re.compile(r"(?:model|ernie)\.mtp_(?:block|emb_norm|hidden_norm|linear_proj)\.(\d+)\.")


def is_mtp(name: str) -> bool:
    """Whether a tensor or atom belongs to multi-token prediction."""
    return _MTP.match(name) is not None


# ---------------------------------------------------------------------- what the tensors tell
@dataclass(frozen=True)
class Form:
    """What config.json leaves open. The first four say what the model holds, the rest how this folder stores it."""

    head: bool  # the output head has weights of its own
    mtp_layers: int = 0
    head_bias: bool = False
    correction_bias: bool = True  # False: an older mixture of experts without these tensors
    head_copy: bool = False  # tied, and the embedding is stored a second time as lm_head.weight
    head_rows: bool = True  # lm_head.weight is stored [vocabulary, hidden]
    mtp_rows: bool = True  # mtp_linear_proj is stored [2 hidden, hidden]

    @classmethod
    def usual(cls, cfg: ErnieConfig, layout: str, *, mtp_layers: int = 0) -> Form:
        """How `layout` is written when nothing says otherwise.

        -PT stores mtp_linear_proj as torch.nn.Linear does, [hidden, 2 hidden]: inference engines load it untransposed.
        """
        rows = layout == "pt" or (layout == "paddle" and cfg.tie_word_embeddings)
        head = not (cfg.tie_word_embeddings or cfg.is_reward)
        return cls(head=head, mtp_layers=mtp_layers, head_rows=rows, mtp_rows=layout != "pt")

    @classmethod
    def found(cls, cfg: ErnieConfig, layout: str, shapes: Mapping[str, tuple[int, ...]]) -> Form:
        """The form of a folder whose tensors have these shapes."""
        usual = cls.usual(cfg, layout)
        rows, stored = (cfg.vocab_size, cfg.hidden_size), shapes.get(HEAD)
        tells = stored in (rows, rows[::-1]) and rows[0] != rows[1]
        mtp = [int(match[1]) for match in map(_MTP.match, shapes) if match]
        linear = next((shape for name, shape in shapes.items() if "mtp_linear_proj" in name), None)
        # Vision-language models never tie: a stored head is always their own, whatever tie_word_embeddings says.
        copy = cfg.tie_word_embeddings and stored is not None and not cfg.is_vl and not cfg.is_reward
        return cls(
            head=usual.head or (stored is not None and not copy and not cfg.is_reward),
            mtp_layers=max(mtp, default=-1) + 1,
            head_bias=HEAD_BIAS in shapes,
            correction_bias=not cfg.is_moe or any(name.endswith(CORRECTION_BIAS) for name in shapes),
            head_copy=copy,
            head_rows=stored == rows if tells else usual.head_rows,
            mtp_rows=usual.mtp_rows or linear == (2 * cfg.hidden_size, cfg.hidden_size),
        )

    def holds_as(self, other: Form) -> bool:
        """Whether both hold the same atoms."""
        return (self.head, self.mtp_layers, self.head_bias, self.correction_bias) == (
            other.head, other.mtp_layers, other.head_bias, other.correction_bias,
        )  # fmt: skip

    def in_layout(self, cfg: ErnieConfig, layout: str) -> Form:
        """The same atoms, stored as `layout` usually stores them."""
        usual = Form.usual(cfg, layout)
        return dataclasses.replace(self, head_copy=False, head_rows=usual.head_rows, mtp_rows=usual.mtp_rows)


def layout_of(names: Collection[str], where: str) -> str:
    """Tell the layout by tensor names: neither file metadata nor config.json say it reliably."""
    if any(name.startswith("ernie.") for name in names):
        return "paddle"
    fused = next((name for name in sorted(names) if ".qkv_proj." in name or ".up_gate_proj." in name), None)
    if fused:
        raise CheckpointError(
            f"{where}: '{fused}' is a fused tensor under a 'model.' name: this is PaddleFormers' in-memory layout, "
            "whose query, key and value are interleaved per head group. Its shapes would fit and its numbers would be "
            "wrong, so it is refused. Save the model there with its Hugging Face conversion on (the -PT layout)."
        )
    nested = next((name for name in sorted(names) if re.match(r"(model\.)?language_model\.", name)), None)
    if nested:
        raise CheckpointError(
            f"{where}: '{nested}' is transformers' nested vision-language form, which is not read yet; use the flat "
            "form that Baidu publishes (vision_model.*, model.layers.*)."
        )
    if any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in names):
        return "pt"
    raise CheckpointError(
        f"{where}: none of its {len(names)} tensors is named as in ERNIE 4.5 (-Paddle: 'ernie.layers...', -PT: "
        f"'model.layers...'); found {', '.join(sorted(names)[:3]) or 'nothing'}."
    )


# ---------------------------------------------------------------------- the map
@dataclass(frozen=True)
class Atom:
    """Shape [out, in] of a piece, and whether a -PT file always keeps it in fp32."""

    shape: tuple[int, ...]
    fp32: bool = False


@dataclass(frozen=True)
class Place:
    """Where an atom lies."""

    tensor: str
    view: View


@dataclass(frozen=True)
class Tensor:
    """A stored tensor and the atoms that fill it."""

    shape: tuple[int, ...]
    parts: list[tuple[str, View]] = field(default_factory=list)


@dataclass
class Table:
    """One layout of one model. Tensors are in model order.

    In memory, of a rank that holds a part: tensors and atoms have the sizes of the part, and `held` says which part of
    an atom that is, as the atom's view shows it (atoms that are whole are not named).
    """

    atoms: dict[str, Atom] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, tuple[slice, ...]] = field(default_factory=dict)


def layout_table(cfg: ErnieConfig, layout: str, form: Form, *, cut: Cut = WHOLE) -> Table:
    """The map of `cfg` in "pt", "paddle" or "ram"; in memory, of what `cut` holds."""
    assert layout in (*DISK_LAYOUTS, "ram"), layout
    assert layout == "ram" or cut == WHOLE, "files hold whole models"
    if cfg.is_vl and layout == "ram":
        raise CheckpointError(
            "vision-language models can be converted, verified and initialised, but not loaded into memory yet."
        )
    builder = _Builder(cfg, layout, cut)
    rows = cut.part(cfg.vocab_size)
    builder.add(
        EMBEDDING, (size(rows), cfg.hidden_size), tensor=builder.stored(EMBEDDING), view=whole, held=(rows,)
    )  # fmt: skip
    for i in range(cfg.num_hidden_layers):
        builder.decoder_layer(f"model.layers.{i}.", sparse=cfg.is_sparse(i), correction_bias=form.correction_bias)
    builder.vector("model.norm.weight", cfg.hidden_size)
    for i in range(form.mtp_layers):
        builder.mtp(i, form)
    if cfg.is_vl:
        builder.vision_tower()
        builder.resampler()
    builder.head(form)
    return builder.table


def memory_table(cfg: ErnieConfig, *, head_bias: bool, cut: Cut = WHOLE) -> Table:
    """The parameters of a model in memory, as far as `cut` holds them."""
    form = Form.usual(cfg, "ram", mtp_layers=cfg.num_nextn_predict_layers)
    return layout_table(cfg, "ram", dataclasses.replace(form, head_bias=head_bias), cut=cut)


class Part(NamedTuple):
    """A projection of `width` outs in `heads` (0: they have none), and which heads or outs are held."""

    width: int
    heads: int
    held: slice


class _Builder:
    """Adds the modules of a model to a table, in one layout."""

    def __init__(self, cfg: ErnieConfig, layout: str, cut: Cut) -> None:
        self.cfg, self.layout, self.cut, self.table = cfg, layout, cut, Table()

    # ---- tensors
    def stored(self, name: str) -> str:
        """An atom's name in this layout, before fusing."""
        return "ernie." + name.removeprefix("model.") if self.layout == "paddle" and name.startswith("model.") else name

    def add(
        self, atom: str, shape: tuple[int, ...], *, tensor: str, view: View, stored: tuple[int, ...] = (),
        fp32: bool = False, held: tuple[slice, ...] = (),
    ) -> None:  # fmt: skip
        """Place an atom. The first place of an atom is where it is read; all of them are written."""
        table = self.table
        if held and self.cut != WHOLE:
            table.held[atom] = held
        table.atoms.setdefault(atom, Atom(shape, fp32))
        table.places.setdefault(atom, Place(tensor, view))
        table.tensors.setdefault(tensor, Tensor(stored or shape)).parts.append((atom, view))

    def vector(self, name: str, width: int) -> None:
        self.add(name, (width,), tensor=self.stored(name), view=whole)

    def matrix(
        self, name: str, out_features: int, in_features: int, *, fp32: bool = False, held: tuple[slice, ...] = ()
    ) -> None:
        """A matrix that -PT stores [out, in] and the others [in, out]."""
        shape, flip = (out_features, in_features), self.layout != "pt"
        self.add(
            name, shape, tensor=self.stored(name), view=transposed if flip else whole,
            stored=shape[::-1] if flip else shape, fp32=fp32, held=held,
        )  # fmt: skip

    def linear(
        self, name: str, out_features: int, in_features: int, *, bias: bool, held: tuple[slice, ...] = ()
    ) -> None:
        """`held` is about the weight: nobody holds a part of this bias."""
        self.matrix(name + ".weight", out_features, in_features, held=held)
        if bias:
            self.vector(name + ".bias", out_features)

    def fused(self, prefix: str, parts: Mapping[str, Part], *, into: str, bias: bool) -> None:
        """Projections from the hidden state that -Paddle fuses on the out axis."""
        total = sum(part.width for part in parts.values())
        # The real ERNIEKit stores (q, k, v) head by head when every head has its own key and value.
        triplets = len(parts) == 3 and len({(part.width, part.heads) for part in parts.values()}) == 1
        for kind, inputs in (("weight", (self.cfg.hidden_size,)), ("bias", ()))[: 1 + bias]:
            start = 0
            for which, (name, (width, heads, held)) in enumerate(parts.items()):
                atom, shape = f"{prefix}{name}.{kind}", (width, *inputs)
                tensor, stored = self.stored(atom), shape
                view: View = whole
                if self.layout == "paddle":
                    tensor, stored = self.stored(f"{prefix}{into}.{kind}"), (*inputs, total)
                    view = head_triplets(which, heads) if triplets else columns(start, start + width)
                elif self.layout == "ram":
                    stored, view = shape[::-1], transposed
                if heads and not (triplets and self.layout == "paddle"):
                    view = split_heads(view, heads)
                self.add(atom, shape, tensor=tensor, view=view, stored=stored, held=(held,))
                start += width

    # ---- modules
    def decoder_layer(self, prefix: str, *, sparse: bool, correction_bias: bool) -> None:
        cfg = self.cfg
        self.vector(prefix + "input_layernorm.weight", cfg.hidden_size)
        query = self._heads(self.cut.part(cfg.num_attention_heads))
        other = self._heads(self.cut.kv_heads(cfg.num_key_value_heads))
        parts = {"q_proj": query, "k_proj": other, "v_proj": other}
        self.fused(prefix + "self_attn.", parts, into="qkv_proj", bias=cfg.use_bias)
        ins = slice(query.held.start * cfg.head_dim, query.held.stop * cfg.head_dim)
        self.linear(
            prefix + "self_attn.o_proj", cfg.hidden_size, query.width, bias=cfg.use_bias, held=(slice(None), ins)
        )  # fmt: skip
        self.vector(prefix + "post_attention_layernorm.weight", cfg.hidden_size)
        if sparse:
            self.mixture(prefix + "mlp.", correction_bias=correction_bias)
        else:
            self.mlp(prefix + "mlp.", cfg.intermediate_size, bias=cfg.use_bias)

    def _heads(self, held: slice) -> Part:
        return Part(size(held) * self.cfg.head_dim, size(held), held)

    def mlp(self, prefix: str, whole_width: int, *, bias: bool) -> None:
        held = self.cut.part(whole_width)
        part = Part(size(held), 0, held)
        self.fused(prefix, {"gate_proj": part, "up_proj": part}, into="up_gate_proj", bias=bias)
        self.linear(
            prefix + "down_proj", self.cfg.hidden_size, part.width, bias=bias, held=(slice(None), held)
        )  # fmt: skip

    def mixture(self, prefix: str, *, correction_bias: bool) -> None:
        cfg = self.cfg
        groups = expert_groups(cfg)
        for row, (experts, _) in enumerate(groups):
            name = prefix + ("gate.weight" if row == 0 else f"gate.weight_{row}")
            if cfg.is_vl:  # stored [hidden, experts] in both layouts
                self.add(
                    name, (experts, cfg.hidden_size), tensor=self.stored(name), view=transposed,
                    stored=(cfg.hidden_size, experts), fp32=True,
                )  # fmt: skip
            else:
                self.matrix(name, experts, cfg.hidden_size, fp32=True)
        if correction_bias:
            name, shape = prefix + CORRECTION_BIAS, (len(groups), groups[0][0])
            self.add(name, shape, tensor=self.stored(name), view=whole, fp32=True)
        widths = [width for experts, width in groups for _ in range(experts)]
        for index in self.cut.experts(len(widths)):
            if self.layout == "ram":
                self.stacked_expert(prefix + "experts.", index, whole_width=widths[index], experts=len(widths))
            else:
                self.mlp(f"{prefix}experts.{index}.", widths[index], bias=False)
        if cfg.moe_num_shared_experts:
            self.mlp(prefix + "shared_experts.", cfg.shared_intermediate_size, bias=cfg.use_bias)

    def stacked_expert(self, prefix: str, index: int, *, whole_width: int, experts: int) -> None:
        """In memory the experts of a layer are stacked: gate_up_proj [E, H, 2I] (gate first), down_proj [E, I, H]."""
        hidden, held, all_held = self.cfg.hidden_size, self.cut.expert_part(whole_width), self.cut.experts(experts)
        width, place, count = size(held), index - all_held.start, len(all_held)
        for part, start in (("gate_proj", 0), ("up_proj", width)):
            self.add(
                f"{prefix}{index}.{part}.weight", (width, hidden), tensor=prefix + "gate_up_proj",
                view=expert(place, columns(start, start + width)), stored=(count, hidden, 2 * width), held=(held,),
            )  # fmt: skip
        self.add(
            f"{prefix}{index}.down_proj.weight", (hidden, width), tensor=prefix + "down_proj",
            view=expert(place, transposed), stored=(count, width, hidden), held=(slice(None), held),
        )  # fmt: skip

    def mtp(self, index: int, form: Form) -> None:
        """Multi-token prediction: a block is built like the decoder layer of its index, so dense in released models."""
        hidden, cfg = self.cfg.hidden_size, self.cfg
        self.decoder_layer(
            f"model.mtp_block.{index}.", sparse=cfg.is_sparse(index), correction_bias=form.correction_bias
        )
        self.vector(f"model.mtp_emb_norm.{index}.weight", hidden)
        self.vector(f"model.mtp_hidden_norm.{index}.weight", hidden)
        name, shape = f"model.mtp_linear_proj.{index}.weight", (hidden, 2 * hidden)
        self.add(
            name, shape, tensor=self.stored(name), view=transposed if form.mtp_rows else whole,
            stored=shape[::-1] if form.mtp_rows else shape,
        )  # fmt: skip

    def head(self, form: Form) -> None:
        cfg = self.cfg
        if cfg.is_reward:
            self.matrix(SCORE, 1, cfg.hidden_size)
            return
        held = self.cut.part(cfg.vocab_size)
        rows = (size(held), cfg.hidden_size)
        if form.head or form.head_copy:
            self.add(
                HEAD if form.head else EMBEDDING, rows, tensor=HEAD, view=whole if form.head_rows else transposed,
                stored=rows if form.head_rows else rows[::-1], held=(held,),
            )  # fmt: skip
        if form.head_bias:
            self.add(HEAD_BIAS, (size(held),), tensor=self.stored(HEAD_BIAS), view=whole, held=(held,))

    def vision_tower(self) -> None:
        vision = VisionSizes.of(self.cfg)
        width = vision.width
        self.matrix("vision_model.patch_embed.proj.weight", width, vision.patch)
        for i in range(vision.depth):
            block = f"vision_model.blocks.{i}."
            for norm in ("norm1", "norm2"):
                self.vector(f"{block}{norm}.weight", width)
                self.vector(f"{block}{norm}.bias", width)
            self.linear(block + "attn.qkv", 3 * width, width, bias=True)
            self.linear(block + "attn.proj", width, width, bias=True)
            self.linear(block + "mlp.fc1", vision.mlp, width, bias=True)
            self.linear(block + "mlp.fc2", width, vision.mlp, bias=True)
        self.vector("vision_model.ln.weight", width)
        self.vector("vision_model.ln.bias", width)

    def resampler(self) -> None:
        vision, prefix = VisionSizes.of(self.cfg), "model.resampler_model."
        inputs_of = {"spatial_linear": vision.merged, "temporal_linear": vision.frames}
        for name, inputs in ((name, inputs) for name, inputs in inputs_of.items() if inputs):
            self.linear(f"{prefix}{name}.0", vision.merged, inputs, bias=True)
            self.linear(f"{prefix}{name}.2", vision.merged, vision.merged, bias=True)
            self.vector(f"{prefix}{name}.3.weight", vision.merged)
            self.vector(f"{prefix}{name}.3.bias", vision.merged)
        self.linear(prefix + "mlp", self.cfg.hidden_size, vision.merged, bias=True)
        self.vector(prefix + "after_norm.weight", self.cfg.hidden_size)
