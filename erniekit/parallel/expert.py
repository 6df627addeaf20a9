"""Experts on many ranks: every rank holds some of them, and tokens go where their experts are.

A rank sorts its routed rows by expert, so that they lie in the order of the ranks that hold the experts. The ranks tell
each other how many rows they send to every expert (one small exchange), then exactly those rows travel; on arrival they
are sorted by expert once more, and the outputs go back the same way. Nothing is padded or dropped; a rank may send
nothing, or get nothing. Where experts weigh their rows (models/moe.py), the weights travel beside the rows, in fp32;
where they have a wire, rows go out as it writes them, and come back as they are.

    experts over data ranks     every rank has rows of its own. Where there are tensor ranks besides, each of them holds
                                a slice of the width of its experts and sends whole rows along its own data axis; the
                                outputs are partial sums, which are added up last.
    experts over tensor ranks   experts are whole. Tensor ranks see the same tokens, so each one takes a part of them
                                through the experts; with sequence parallelism it has only a part in the first place.

While rows are under way the shared experts work (models/moe.py). Knows no names of parameters: who holds which experts
is said in config/cut.py. On Hopper GPUs DeepEP takes tokens there and back in its own way (deep_ep.py).
Shapes: M tokens, K experts per token, T routed rows sent, R rows received, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import paddle
from paddle import Tensor, nn

from erniekit.models.moe import Experts, MoE, Routing
from erniekit.ops.grouped import Order, add_up, combine, permute, permute_weights, sort_by_expert
from erniekit.parallel.collectives import Axis
from erniekit.parallel.deep_ep import DeepEP, serves
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.passing import copy_in, exchange, join, reduce_out, split


def use_expert_parallel(model: nn.Layer, mesh: Mesh) -> None:
    """Let every mixture of experts work with the experts that other ranks hold; its own are a part already."""
    axis = mesh.axis("expert")
    if axis.size == mesh.axis("tensor").size == 1:
        return
    way = DeepEP(axis) if serves(axis, model) else Rows(axis)
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, MoE):
            layer.dispatcher = ExpertDispatcher(mesh, way)


class Way(Protocol):
    """Brings tokens to their experts and back."""

    def __call__(
        self, x_MD: Tensor, chosen_MK: Tensor, weights_MK: Tensor, experts: Experts
    ) -> Callable[[], Tensor]:  # fmt: skip
        """Send x; what is returned waits for it and gives the weighted sums [M, D]."""


class ExpertDispatcher(nn.Layer):
    """Brings tokens to experts on other ranks, dropless, and sums their outputs. No parameters."""

    def __init__(self, mesh: Mesh, way: Way) -> None:
        super().__init__()
        self._tensor, self._way = mesh.axis("tensor"), way
        self._cut_width = mesh.layout.experts_over == "data"
        self._cut_tokens = mesh.layout.experts_over == "tensor" and not mesh.layout.sequence_parallel

    def forward(self, x_MD: Tensor, routing: Routing, experts: Experts) -> Callable[[], Tensor]:
        """See LocalDispatcher."""
        total, chosen_MK, weights_MK = x_MD.shape[0], routing.experts_MK, routing.weights_MK
        if self._cut_tokens:
            chosen_MK = chosen_MK[self._tensor.share(total)]
            x_MD, weights_MK = (split(x, self._tensor, dim=0) for x in (x_MD, weights_MK))
        elif self._cut_width:
            x_MD, weights_MK = (copy_in(x, self._tensor) for x in (x_MD, weights_MK))
        returning = self._way(x_MD, chosen_MK, weights_MK, experts)

        def arrive() -> Tensor:
            y_MD = returning()
            if self._cut_tokens:
                return join(y_MD, self._tensor, dim=0, total=total)
            return reduce_out(y_MD, self._tensor) if self._cut_width else y_MD

        return arrive


class Rows:
    """Routed rows over the collectives of an axis: exactly those, in both directions."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __call__(
        self, x_MD: Tensor, chosen_MK: Tensor, weights_MK: Tensor, experts: Experts
    ) -> Callable[[], Tensor]:  # fmt: skip
        """See Way."""
        axis, weighed = self._axis, experts.weighs_rows
        order = sort_by_expert(chosen_MK, num_experts=experts.num_experts * axis.size)
        going = [permute(x_MD, order)]
        if weighed:
            going.append(permute_weights(weights_MK, order).unsqueeze(-1))

        def work(counts: list[int], x_RD: Tensor, *weights_R1: Tensor) -> Tensor:
            return experts(x_RD, counts, *(weights.squeeze(-1) for weights in weights_R1))

        def summed(y_TD: Tensor) -> Tensor:
            return add_up(y_TD, order) if weighed else combine(y_TD, weights_MK.astype(y_TD.dtype), order)

        if axis.size == 1:
            return lambda: summed(work(order.counts, *going))
        plan = Plan.of(order.counts, axis)
        wires = [experts.wire, None]
        arriving = [
            exchange(rows, axis, send=plan.send, receive=plan.receive, wire=wire)
            for rows, wire in zip(going, wires, strict=False)
        ]

        def back() -> Tensor:
            by_expert = plan.by_expert()
            y_RD = work(by_expert.counts, *(permute(arrived(), by_expert) for arrived in arriving))
            y_RD = permute(y_RD, _undone(by_expert))
            return summed(exchange(y_RD, axis, send=plan.receive, receive=plan.send)())

        return back


@dataclass(frozen=True)
class Plan:
    """How many rows go where."""

    send: list[int]  # rows to every rank
    receive: list[int]  # rows from every rank
    arriving: np.ndarray  # rows from every rank to every expert held here

    @classmethod
    def of(cls, counts: list[int], axis: Axis) -> Plan:
        """Learn from all ranks what they send; `counts` are this rank's rows for every expert there is."""
        everywhere = axis.all_gather(paddle.to_tensor([counts], "int64")).numpy()  # [ranks, experts]
        rows = everywhere.reshape([axis.size, axis.size, -1])  # from rank, to rank, to expert
        arriving = rows[:, axis.index]
        return cls(rows[axis.index].sum(-1).tolist(), arriving.sum(-1).tolist(), arriving)

    def by_expert(self) -> Order:
        """How rows that arrived, sorted by expert within every rank, are sorted by expert alone."""
        num_experts = self.arriving.shape[1]
        experts_R = np.concatenate([np.repeat(np.arange(num_experts), counts) for counts in self.arriving])
        return sort_by_expert(paddle.to_tensor(experts_R, "int64").unsqueeze(-1), num_experts=num_experts)


def _undone(order: Order) -> Order:
    """The way back from `order`, which has one row for every token."""
    return Order(token_T=order.place_MC.reshape([-1]), place_MC=order.token_T.unsqueeze(-1), counts=order.counts)
