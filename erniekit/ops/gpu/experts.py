"""Routed experts on Triton's kernels: the same names and arguments as ops/cpu/experts.py. Numbers are bf16, sums fp32.

Shapes: M tokens, C experts per token, T = M*C routed rows, D hidden size, E experts, I expert width, F outputs.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import paddle

from erniekit.ops.gpu.driver import launching
from erniekit.ops.gradients import only, wanted
from erniekit.ops.mlp import gated
from erniekit.ops.triton import grouped, moves

if TYPE_CHECKING:
    from erniekit.ops.grouped import Order


def _copied(x_MD: paddle.Tensor, place_MC: paddle.Tensor, weights_MC: paddle.Tensor | None = None) -> paddle.Tensor:
    y_TD = paddle.empty([place_MC.size, x_MD.shape[1]], x_MD.dtype)
    with launching():
        moves.spread(x_MD.contiguous(), y_TD, places=place_MC, weights=weights_MC)
    return y_TD


def _sums(rows_TD: paddle.Tensor, place_MC: paddle.Tensor, weights_MC: paddle.Tensor | None = None) -> paddle.Tensor:
    sum_MD = paddle.empty([place_MC.shape[0], rows_TD.shape[1]], rows_TD.dtype)
    with launching():
        moves.gather(rows_TD.contiguous(), sum_MD, places=place_MC, weights=weights_MC)
    return sum_MD


class _Permute(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_MD, place_MC):
        ctx.save_for_backward(place_MC)
        return _copied(x_MD, place_MC)

    @staticmethod
    def backward(ctx, grad_TD):
        return _sums(grad_TD, *ctx.saved_tensor()), None


class _AddUp(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, y_TD, place_MC):
        ctx.save_for_backward(place_MC)
        return _sums(y_TD, place_MC)

    @staticmethod
    def backward(ctx, grad_MD):
        return _copied(grad_MD, *ctx.saved_tensor()), None


class _Combine(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, y_TD, weights_MC, place_MC):
        ctx.wanted, y_TD, weights_MC = wanted(y_TD, weights_MC), y_TD.contiguous(), weights_MC.contiguous()
        ctx.save_for_backward(y_TD, weights_MC, place_MC)
        return _sums(y_TD, place_MC, weights_MC)

    @staticmethod
    def backward(ctx, grad_MD):
        y_TD, weights_MC, place_MC = ctx.saved_tensor()
        grad_MD, grad_weights = grad_MD.contiguous(), paddle.empty_like(weights_MC)
        with launching():
            moves.dots(y_TD, grad_MD, grad_weights, places=place_MC)
        return (*only(ctx.wanted, (_copied(grad_MD, place_MC, weights_MC), grad_weights)), None)


class _GroupedLinear(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weight_EDF, ends_E):
        ctx.wanted, x_TD = wanted(x_TD, weight_EDF), x_TD.contiguous()
        ctx.save_for_backward(x_TD, weight_EDF, ends_E)
        y_TF = paddle.empty([x_TD.shape[0], weight_EDF.shape[2]], x_TD.dtype)
        with launching():
            grouped.product16(x_TD, weight_EDF, y_TF, ends=ends_E)
        return y_TF

    @staticmethod
    def backward(ctx, grad_TF):
        x_TD, weight_EDF, ends_E = ctx.saved_tensor()
        grad_TF, grad_x, grad_weight = grad_TF.contiguous(), None, None
        with launching():
            if ctx.wanted[0]:
                grad_x = paddle.empty_like(x_TD)
                grouped.product16(grad_TF, weight_EDF, grad_x, ends=ends_E, turned=True)
            if ctx.wanted[1]:
                grad_weight = paddle.empty_like(weight_EDF)
                grouped.weight_product16(x_TD, grad_TF, grad_weight, ends=ends_E)
        return grad_x, grad_weight, None


def permute(x_MD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Rows copied once per choice, sorted by expert."""
    return _Permute.apply(x_MD, order.place_MC)


def add_up(y_TD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Sum of every token's rows."""
    return _AddUp.apply(y_TD, order.place_MC)


def combine(y_TD: paddle.Tensor, weights_MC: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Weighted sum of every token's rows."""
    return _Combine.apply(y_TD, weights_MC, order.place_MC)


def grouped_linear(
    x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, *, counts: list[int], bf16: bool  # noqa: ARG001 - as on a CPU
) -> paddle.Tensor:  # fmt: skip
    """One product per expert over its rows, in bf16 whatever `bf16` says: that is for the CPU's kernels."""
    ends_E = paddle.to_tensor(list(itertools.accumulate(counts)), "int32", place=x_TD.place)
    return _GroupedLinear.apply(x_TD, weight_EDF, ends_E)


def grouped_mlp(
    x_TD: paddle.Tensor, gate_up_ED2I: paddle.Tensor, down_EID: paddle.Tensor, *, counts: list[int], bf16: bool
) -> paddle.Tensor:
    """One gated MLP per expert over its rows."""
    hidden_T2I = grouped_linear(x_TD, gate_up_ED2I, counts=counts, bf16=bf16)
    return grouped_linear(gated(hidden_T2I), down_EID, counts=counts, bf16=bf16)
