"""Routed experts on their kernels (csrc/experts.cpp).

Shapes: M tokens, C experts per token, T = M*C routed rows, D hidden size, E experts, I expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import paddle

from erniekit.ops.cpu.library import call
from erniekit.ops.gradients import only, wanted

if TYPE_CHECKING:
    from erniekit.ops.grouped import Order


def sort_by_expert(experts_MC: paddle.Tensor, *, num_experts: int) -> tuple[paddle.Tensor, paddle.Tensor, list[int]]:
    """(token_T, place_MC, rows per expert) of a stable counting sort."""
    experts_MC = experts_MC.detach().contiguous()
    token_T, place_MC = paddle.empty([experts_MC.size], "int64"), paddle.empty_like(experts_MC)
    counts_E = paddle.empty([num_experts], "int64")
    sizes = (token_T.size, experts_MC.shape[1], num_experts)
    wrong = call("sort_by_expert", experts_MC, token_T, place_MC, counts_E, *sizes)
    assert wrong < 0, f"routed row {wrong} names no expert of {num_experts}"
    return token_T, place_MC, counts_E.tolist()


def _copied(x_MD: paddle.Tensor, token_T: paddle.Tensor) -> paddle.Tensor:
    y_TD = paddle.empty([token_T.shape[0], x_MD.shape[1]], "float32")
    call("permute", x_MD.contiguous(), token_T, y_TD, *y_TD.shape)
    return y_TD


def _sums(rows_TD: paddle.Tensor, place_MC: paddle.Tensor) -> paddle.Tensor:
    sizes = (*place_MC.shape, rows_TD.shape[1])
    sum_MD = paddle.empty([sizes[0], sizes[2]], "float32")
    call("combine", rows_TD.contiguous(), None, place_MC, sum_MD, *sizes)
    return sum_MD


class _Permute(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_MD, token_T, place_MC):
        ctx.save_for_backward(place_MC)
        return _copied(x_MD, token_T)

    @staticmethod
    def backward(ctx, grad_TD):
        return _sums(grad_TD, *ctx.saved_tensor()), None, None


class _AddUp(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, y_TD, token_T, place_MC):
        ctx.save_for_backward(token_T)
        return _sums(y_TD, place_MC)

    @staticmethod
    def backward(ctx, grad_MD):
        return _copied(grad_MD, *ctx.saved_tensor()), None, None


class _Combine(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, y_TD, weights_MC, place_MC):
        ctx.wanted = wanted(y_TD, weights_MC)
        y_TD, weights_MC = y_TD.contiguous(), weights_MC.contiguous()
        ctx.sizes = (*place_MC.shape, y_TD.shape[1])
        out_MD = paddle.empty([ctx.sizes[0], ctx.sizes[2]], "float32")
        call("combine", y_TD, weights_MC, place_MC, out_MD, *ctx.sizes)
        ctx.save_for_backward(y_TD, weights_MC, place_MC)
        return out_MD

    @staticmethod
    def backward(ctx, grad_MD):
        y_TD, weights_MC, place_MC = ctx.saved_tensor()
        grads = [paddle.empty_like(y_TD), paddle.empty_like(weights_MC)]
        call("combine_backward", y_TD, weights_MC, place_MC, grad_MD.contiguous(), *grads, *ctx.sizes)
        return (*only(ctx.wanted, grads), None)


class _GroupedMLP(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, gate_up_ED2I, down_EID, counts_E, bf16: bool):
        ctx.wanted = wanted(x_TD, gate_up_ED2I, down_EID)
        inputs = [tensor.contiguous() for tensor in (x_TD, gate_up_ED2I, down_EID, counts_E)]
        num_experts, width, size = down_EID.shape
        ctx.sizes = (num_experts, size, width, bf16)
        y_TD = paddle.empty(x_TD.shape, "float32")
        hidden_T2I = paddle.empty([x_TD.shape[0], 2 * width], "float32")
        call("experts_forward", *inputs, hidden_T2I, y_TD, *ctx.sizes)
        ctx.save_for_backward(*inputs, hidden_T2I)
        return y_TD

    @staticmethod
    def backward(ctx, grad_TD):
        saved = ctx.saved_tensor()
        grads = [paddle.empty_like(x) if want else None for x, want in zip(saved, ctx.wanted, strict=False)]
        call("experts_backward", *saved, grad_TD.contiguous(), *grads, *ctx.sizes)
        return (*grads, None)


class _GroupedLinear(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weight_EDF, counts_E, bf16: bool):
        ctx.wanted = wanted(x_TD, weight_EDF)
        x_TD, weight_EDF = x_TD.contiguous(), weight_EDF.contiguous()
        ctx.sizes = (*weight_EDF.shape, bf16)
        y_TF = paddle.empty([x_TD.shape[0], weight_EDF.shape[2]], "float32")
        call("grouped_linear_forward", x_TD, weight_EDF, counts_E, y_TF, *ctx.sizes)
        ctx.save_for_backward(weight_EDF, counts_E, *([x_TD] if ctx.wanted[1] else []))
        return y_TF

    @staticmethod
    def backward(ctx, grad_TF):
        weight_EDF, counts_E, *inputs = ctx.saved_tensor()
        x_TD = inputs[0] if inputs else None
        shapes = ([grad_TF.shape[0], weight_EDF.shape[1]], weight_EDF.shape)
        grads = [paddle.empty(s, "float32") if want else None for s, want in zip(shapes, ctx.wanted, strict=True)]
        call("grouped_linear_backward", x_TD, weight_EDF, counts_E, grad_TF.contiguous(), *grads, *ctx.sizes)
        return (*grads, None)


def weighted_gated(hidden_T2I: paddle.Tensor, weights_T: paddle.Tensor | None) -> paddle.Tensor:
    """silu(first half) * second half * weight; without a gradient."""
    rows, width = hidden_T2I.shape[0], hidden_T2I.shape[1] // 2
    act_TI = paddle.empty([rows, width], "float32")
    weights_T = None if weights_T is None else weights_T.contiguous()
    call("weighted_gated_forward", hidden_T2I.contiguous(), weights_T, act_TI, rows, width)
    return act_TI


def weighted_gated_backward(
    hidden_T2I: paddle.Tensor, weights_T: paddle.Tensor | None, grad_TI: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor | None]:
    """(the result once more, gradient of hidden, gradient of the weights)."""
    hidden_T2I, act_TI, grad_T = hidden_T2I.contiguous(), paddle.empty_like(grad_TI), None
    if weights_T is not None:
        weights_T, grad_T = weights_T.contiguous(), paddle.empty(weights_T.shape, "float32")
    made = (act_TI, paddle.empty_like(hidden_T2I), grad_T)
    call("weighted_gated_backward", hidden_T2I, weights_T, grad_TI.contiguous(), *made, *grad_TI.shape)
    return made


def permute(x_MD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Rows copied once per choice, sorted by expert."""
    return _Permute.apply(x_MD, order.token_T, order.place_MC)


def add_up(y_TD: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Sum of every token's rows."""
    return _AddUp.apply(y_TD, order.token_T, order.place_MC)


def combine(y_TD: paddle.Tensor, weights_MC: paddle.Tensor, order: Order) -> paddle.Tensor:
    """Weighted sum of every token's rows."""
    return _Combine.apply(y_TD, weights_MC, order.place_MC)


def grouped_mlp(
    x_TD: paddle.Tensor, gate_up_ED2I: paddle.Tensor, down_EID: paddle.Tensor, *, counts: list[int], bf16: bool
) -> paddle.Tensor:
    """One gated MLP per expert over its rows."""
    return _GroupedMLP.apply(x_TD, gate_up_ED2I, down_EID, paddle.to_tensor(counts, "int64"), bf16)


def grouped_linear(
    x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, *, counts: list[int], bf16: bool
) -> paddle.Tensor:
    """One product per expert over its rows."""
    return _GroupedLinear.apply(x_TD, weight_EDF, paddle.to_tensor(counts, "int64"), bf16)
