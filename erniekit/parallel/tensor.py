"""Tensor parallelism from outside: a model that holds its part of every matrix (parallel/part.py) is told to talk.

Every block works between two doors. In at the first comes what all ranks have alike, and every rank goes on with its
heads or its width; out at the second go partial sums, which are added up. What stands between blocks (norms, residuals)
every rank computes for itself, alike. With sequence parallelism it does so for its part of the positions: then the
first door gathers the parts and the second gives each rank its part of the sum, so that the same bytes travel and the
memory between blocks is shared.

    without    copy_in  | heads, width |  reduce_out
    with       join_in  | heads, width |  split_out

Doors are forward hooks and the `leave` slot of Linear; nothing is renamed, and no layer changes its kind. Attention
finds its number of heads in the tensors. A mixture of experts needs all tokens alike: with sequence parallelism its
first door gathers for everything inside, router included, unless experts are shared by the tensor ranks: then every
rank routes the tokens that it has. What happens between its router and its sum is parallel/expert.py's.

Which gradients are still to be added up afterwards: `partial_over_tensor` (parallel/styles.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paddle import Tensor, nn

from erniekit.models.attention import Attention, CoreAttention
from erniekit.models.decoder import Decoder, DecoderLayer, ErnieForCausalLM
from erniekit.models.layers import MLP, Linear
from erniekit.models.moe import Experts, MoE
from erniekit.models.reward import ErnieForReward
from erniekit.parallel.collectives import Axis
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.passing import copy_in, join, join_in, reduce_out, split, split_out
from erniekit.parallel.styles import slot_of
from erniekit.parallel.vocab import head_kernels, partial_embedding


@dataclass
class Doors:
    """The ways in and out of blocks. `positions` is the length of the rows whose parts the ranks have between blocks
    in the forward pass that runs; None: every rank has whole rows (generation, or no sequence parallelism)."""

    axis: Axis
    positions: int | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Into a block that works on a part of its matrices."""
        if self.positions is None:
            return copy_in(x, self.axis)
        return join_in(x, self.axis, dim=1, total=self.positions)

    def leave(self, y: Tensor) -> Tensor:
        """Out of it: y is a part of the sum."""
        if self.positions is None:
            return reduce_out(y, self.axis)
        return split_out(y, self.axis, dim=1)

    def gather(self, x: Tensor) -> Tensor:
        """Whole rows, with which every rank goes on alike."""
        return x if self.positions is None else join(x, self.axis, dim=1, total=self.positions)

    def part(self, x: Tensor) -> Tensor:
        """The positions of this rank out of whole rows that all ranks have alike."""
        return x if self.positions is None else split(x, self.axis, dim=1)


def use_tensor_parallel(model: ErnieForCausalLM | ErnieForReward, mesh: Mesh) -> None:
    """Let the ranks of the tensor axis, each with its part of the model, compute together what one would."""
    axis = mesh.axis("tensor")
    if axis.size == 1:
        return
    for name, _ in model.named_parameters():
        slot_of(name)  # every parameter has a style
    _draw_apart(model, mesh)
    doors = Doors(axis)
    _watch_positions(model.model, doors, sequence_parallel=mesh.layout.sequence_parallel)
    _cut_vocabulary(model, doors)
    for layer in [*model.model.layers, *getattr(model.model, "mtp_block", [])]:
        _cut_attention(layer.self_attn, doors)
        if layer.sparse:
            _cut_mixture(layer.mlp, doors, whole_experts=mesh.layout.experts_over == "tensor")
        else:
            _cut_mlp(layer.mlp, doors)


def _draw_apart(model: nn.Layer, mesh: Mesh) -> None:
    """Where a rank works on a part of a tensor, dropout draws from the rank's own stream; elsewhere all drop alike."""
    stream, in_parts = mesh.axis("tensor").index + 1, mesh.layout.sequence_parallel
    whole_experts = mesh.layout.experts_over == "tensor"
    for path, layer in model.named_sublayers():
        if isinstance(layer, CoreAttention):
            layer.stream = stream
        elif isinstance(layer, DecoderLayer):
            layer.stream = stream if in_parts else 0
        elif isinstance(layer, Linear) and layer.adapter is not None:
            style = slot_of(f"{path}.weight").style
            layer.adapter.stream = stream if style.kind == "row" or (in_parts and style.sees == "positions") else 0
        elif isinstance(layer, Experts):
            for adapter, cut in ((layer.gate_up_adapter, whole_experts), (layer.down_adapter, True)):
                if adapter is not None:
                    adapter.stream = stream if cut else 0


def _watch_positions(decoder: Decoder, doors: Doors, *, sequence_parallel: bool) -> None:
    """Every forward pass begins by saying how long its rows are; a cache is filled by whole rows."""

    def begin(_decoder: nn.Layer, given: tuple, named: dict[str, Any]) -> None:
        whole = not sequence_parallel or named.get("cache") is not None
        doors.positions = None if whole else given[0].shape[1]

    decoder.register_forward_pre_hook(begin, with_kwargs=True)
    decoder.norm.register_forward_post_hook(lambda _norm, _given, hidden: doors.gather(hidden))


def _cut_vocabulary(model: ErnieForCausalLM | ErnieForReward, doors: Doors) -> None:
    model.model.embed_tokens.lookup = lambda ids, weight: doors.leave(partial_embedding(ids, weight, axis=doors.axis))
    if isinstance(model, ErnieForCausalLM):
        model.lm_head.kernels = head_kernels(doors.axis)


def _cut_attention(attention: Attention, doors: Doors) -> None:
    def enter(_attention: nn.Layer, given: tuple) -> tuple:
        """A layer that is computed again may come after other rows: its own length counts from its first block on."""
        if doors.positions is not None:
            doors.positions = given[1].cos_BSJ.shape[1]
        return doors.enter(given[0]), *given[1:]

    attention.register_forward_pre_hook(enter)
    attention.o_proj.leave = doors.leave


def _cut_mlp(mlp: MLP, doors: Doors) -> None:
    mlp.register_forward_pre_hook(lambda _layer, given: (doors.enter(given[0]),))
    mlp.down_proj.leave = doors.leave


def _cut_mixture(block: MoE, doors: Doors, *, whole_experts: bool) -> None:
    if not whole_experts:
        block.register_forward_pre_hook(lambda _layer, given: (doors.gather(given[0]),))
        block.register_forward_post_hook(lambda _layer, _given, made: (doors.part(made[0]), made[1]))
    if block.shared_experts is not None:
        _cut_mlp(block.shared_experts, doors if whole_experts else Doors(doors.axis))  # behind the gathering door
