"""Routed experts on one device: permute tokens by expert, one MLP per expert, bring them back weighted.

Shapes: M tokens, C = experts per token, T = M*C routed rows, D hidden size, E experts, I expert width.
The stacked weights are never indexed through autograd (that would build the gradient of the whole stack for every
expert): the expert MLP and the grouped product are PyLayers with a hand-written backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import experts
from erniekit.ops.dispatch import expert_backend
from erniekit.ops.gradients import only, wanted


@dataclass(frozen=True)
class Order:
    """How routed rows are sorted by expert (all int64, no gradients)."""

    token_T: paddle.Tensor  # source token of every sorted row
    place_MC: paddle.Tensor  # sorted row of every (token, choice)
    counts: list[int]  # rows per expert


def _kernels(*tensors: paddle.Tensor) -> ModuleType | None:
    """The module whose functions serve these tensors; None if the plain twins do."""
    chosen = expert_backend(*tensors)
    if chosen == "triton":
        return importlib.import_module("erniekit.ops.gpu.experts")  # Triton is loaded where it is used
    return experts if chosen == "cpu" else None


def sort_by_expert_plain(experts_MC: paddle.Tensor, *, num_experts: int) -> Order:
    """The plain twin of `sort_by_expert`."""
    m, c = experts_MC.shape
    flat_T = experts_MC.detach().reshape([-1])
    order_T = paddle.argsort(flat_T, stable=True)
    place_T = paddle.empty_like(order_T)
    place_T = paddle.scatter(place_T, order_T, paddle.arange(m * c, dtype=order_T.dtype))
    counts = paddle.bincount(flat_T, minlength=num_experts).tolist()
    return Order(token_T=order_T // c, place_MC=place_T.reshape([m, c]), counts=counts)


def sort_by_expert(experts_MC: paddle.Tensor, *, num_experts: int) -> Order:
    """Stable order of the routed rows by expert; `experts_MC` holds the chosen expert ids."""
    if expert_backend(experts_MC) == "cpu":
        return Order(*experts.sort_by_expert(experts_MC, num_experts=num_experts))
    return sort_by_expert_plain(experts_MC, num_experts=num_experts)


def _sums(rows_TD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Every token's rows added up: [M, D]."""
    m, c = order.place_MC.shape
    return paddle.gather(rows_TD, order.place_MC.reshape([-1])).reshape([m, c, rows_TD.shape[-1]]).sum(1)


class _Permute(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_MD, order: Order):
        ctx.order = order
        return paddle.gather(x_MD, order.token_T)

    @staticmethod
    def backward(ctx, grad_TD):
        return _sums(grad_TD, ctx.order)


def permute_plain(x_MD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """The plain twin of `permute`."""
    return _Permute.apply(x_MD, order)


def permute(x_MD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Rows of x [M, D] copied once per choice, sorted by expert: [T, D]."""
    kernels = _kernels(x_MD)
    return (permute_plain if kernels is None else kernels.permute)(x_MD, order)


class _Combine(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, y_TD, weights_MC, order: Order):
        m, c = order.place_MC.shape
        ctx.order, ctx.wanted = order, wanted(y_TD, weights_MC)
        ctx.save_for_backward(y_TD, weights_MC)
        chosen_MCD = paddle.gather(y_TD, order.place_MC.reshape([-1])).reshape([m, c, -1])
        return paddle.matmul(weights_MC.unsqueeze(1), chosen_MCD).squeeze(1)

    @staticmethod
    def backward(ctx, grad_MD):
        y_TD, weights_MC = ctx.saved_tensor()
        m, c = weights_MC.shape
        place_T = ctx.order.place_MC.reshape([-1])
        chosen_MCD = paddle.gather(y_TD, place_T).reshape([m, c, -1])
        grad_weights = paddle.matmul(chosen_MCD, grad_MD.unsqueeze(-1)).squeeze(-1)
        row_weight_T1 = paddle.scatter(paddle.empty_like(weights_MC).reshape([-1]), place_T, weights_MC.reshape([-1]))
        grad_y = paddle.gather(grad_MD, ctx.order.token_T) * row_weight_T1.unsqueeze(-1)
        return only(ctx.wanted, (grad_y, grad_weights))


def combine_plain(y_TD: paddle.Tensor, weights_MC: paddle.Tensor, order: Order) -> paddle.Tensor:
    """The plain twin of `combine`."""
    return _Combine.apply(y_TD, weights_MC, order)


def combine(y_TD: paddle.Tensor, weights_MC: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Weighted sum of each token's expert outputs: [M, D]."""
    kernels = _kernels(y_TD, weights_MC)
    return (combine_plain if kernels is None else kernels.combine)(y_TD, weights_MC, order)


def permute_weights(weights_MC: paddle.Tensor, order: Order) -> paddle.Tensor:
    """The weight of every sorted row, [T]."""
    place_T = order.place_MC.reshape([-1])
    choice_T = paddle.scatter(paddle.empty_like(place_T), place_T, paddle.arange(place_T.size, dtype=place_T.dtype))
    choices = Order(token_T=choice_T, place_MC=place_T.unsqueeze(-1), counts=order.counts)
    return permute(weights_MC.reshape([-1, 1]), choices).squeeze(-1)


class _AddUp(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, y_TD, order: Order):
        ctx.order = order
        return _sums(y_TD, order)

    @staticmethod
    def backward(ctx, grad_MD):
        return paddle.gather(grad_MD, ctx.order.token_T)


def add_up_plain(y_TD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """The plain twin of `add_up`."""
    return _AddUp.apply(y_TD, order)


def add_up(y_TD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Sum of each token's rows, [M, D]: the way back from `permute`, without weights."""
    kernels = _kernels(y_TD)
    return (add_up_plain if kernels is None else kernels.add_up)(y_TD, order)


def rows_of_experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _GroupedMLP(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, gate_up_ED2I, down_EID, counts: list[int]):
        ctx.counts, ctx.wanted = counts, wanted(x_TD, gate_up_ED2I, down_EID)
        ctx.save_for_backward(x_TD, gate_up_ED2I, down_EID)
        out = []
        for expert, rows in rows_of_experts(counts):
            gate, up = paddle.matmul(x_TD[rows], gate_up_ED2I[expert]).chunk(2, axis=-1)
            out.append(paddle.matmul(F.swiglu(gate, up), down_EID[expert]))
        return paddle.concat(out) if out else paddle.zeros_like(x_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, gate_up_ED2I, down_EID = ctx.saved_tensor()
        _, gate_up_wanted, down_wanted = ctx.wanted
        grad_x = []
        grad_gate_up = paddle.zeros_like(gate_up_ED2I) if gate_up_wanted else None
        grad_down = paddle.zeros_like(down_EID) if down_wanted else None
        for expert, rows in rows_of_experts(ctx.counts):
            x, grad = x_TD[rows], grad_TD[rows]
            gate, up = paddle.matmul(x, gate_up_ED2I[expert]).chunk(2, axis=-1)
            sigma = F.sigmoid(gate)
            silu = gate * sigma
            if grad_down is not None:
                grad_down[expert] = paddle.matmul(silu * up, grad, transpose_x=True)
            grad_act = paddle.matmul(grad, down_EID[expert], transpose_y=True)
            grad_gate = grad_act * up * (sigma + silu * (1.0 - sigma))
            grad_both = paddle.concat([grad_gate, grad_act * silu], axis=-1)
            if grad_gate_up is not None:
                grad_gate_up[expert] = paddle.matmul(x, grad_both, transpose_x=True)
            grad_x.append(paddle.matmul(grad_both, gate_up_ED2I[expert], transpose_y=True))
        grad_x_TD = paddle.concat(grad_x) if grad_x else paddle.zeros_like(x_TD)
        return only(ctx.wanted, (grad_x_TD, grad_gate_up, grad_down))


def grouped_mlp_plain(
    x_TD: paddle.Tensor, gate_up_ED2I: paddle.Tensor, down_EID: paddle.Tensor, *, counts: list[int]
) -> paddle.Tensor:
    """The plain twin of `grouped_mlp`."""
    return _GroupedMLP.apply(x_TD, gate_up_ED2I, down_EID, counts)


def grouped_mlp(
    x_TD: paddle.Tensor, gate_up_ED2I: paddle.Tensor, down_EID: paddle.Tensor, *, counts: list[int], bf16: bool = False
) -> paddle.Tensor:
    """down_e(silu(gate_e x) * up_e x), [T, D], for rows sorted by expert; `counts[e]` rows belong to expert e."""
    kernels = _kernels(x_TD, gate_up_ED2I, down_EID)
    if kernels is not None:
        return kernels.grouped_mlp(x_TD, gate_up_ED2I, down_EID, counts=counts, bf16=bf16)
    return grouped_mlp_plain(x_TD, gate_up_ED2I, down_EID, counts=counts)


class _GroupedLinear(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weight_EDF, counts: list[int]):
        ctx.counts, ctx.wanted = counts, wanted(x_TD, weight_EDF)
        ctx.save_for_backward(x_TD, weight_EDF)
        out = [paddle.matmul(x_TD[rows], weight_EDF[expert]) for expert, rows in rows_of_experts(counts)]
        return paddle.concat(out) if out else paddle.zeros([0, weight_EDF.shape[-1]], x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_TF):
        x_TD, weight_EDF = ctx.saved_tensor()
        grad_x = grad_weight = None
        if ctx.wanted[0]:
            rows = rows_of_experts(ctx.counts)
            out = [paddle.matmul(grad_TF[part], weight_EDF[expert], transpose_y=True) for expert, part in rows]
            grad_x = paddle.concat(out) if out else paddle.zeros_like(x_TD)
        if ctx.wanted[1]:
            grad_weight = paddle.zeros_like(weight_EDF)
            for expert, part in rows_of_experts(ctx.counts):
                grad_weight[expert] = paddle.matmul(x_TD[part], grad_TF[part], transpose_x=True)
        return grad_x, grad_weight


def grouped_linear_plain(x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, *, counts: list[int]) -> paddle.Tensor:
    """The plain twin of `grouped_linear`."""
    return _GroupedLinear.apply(x_TD, weight_EDF, counts)


def grouped_linear(
    x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, *, counts: list[int], bf16: bool = False
) -> paddle.Tensor:
    """x @ weight of its expert, [T, F], for rows sorted by expert. A frozen weight costs no gradient."""
    kernels = _kernels(x_TD, weight_EDF)
    if kernels is not None:
        return kernels.grouped_linear(x_TD, weight_EDF, counts=counts, bf16=bf16)
    return grouped_linear_plain(x_TD, weight_EDF, counts=counts)
