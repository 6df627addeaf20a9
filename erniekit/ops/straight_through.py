"""A product of rounded matrices whose backward pass is that of matrices which were not rounded, but for the weight.

    y = (Q_x Q_w) s_x s_w        of FP8 codes, each with one scale; x and w may be rotated: s_w has the 32 in it
    dx = g deq(Q_w)^T            deq turns back what was rotated
    dw = x^T g                   of the inputs as they were, or of the rounded ones if g is rounded, too

Rows may be sorted by expert; then every expert has its weight, and scales of its own. Products are summed in fp32 and
given in the model's dtype: bf16 on a GPU, fp32 on a CPU (parts of a sum that several ranks make are not rounded before
they are added up). Knows codes and scales, not where they come from (precision/qat.py).
Shapes: T rows (tokens), D inputs, F outputs, E experts (1: a linear layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import paddle

from erniekit.ops.arrays.float8 import ADDED
from erniekit.ops.float8 import E4M3, Float8, Kind, Tensor, product, quantise_or_nan, weight_product
from erniekit.ops.gradients import wanted
from erniekit.ops.grouped import rows_of_experts
from erniekit.ops.hadamard import SIZE, rotate, rotate_inputs


def scale_of(largest: paddle.Tensor, kind: Kind) -> paddle.Tensor:
    """The scale of a tensor with this largest number. A division: Paddle multiplies by the reciprocal of a Python
    number, which is off by a bit, and then stored weights would not have the codes of training (encoders.py)."""
    return largest / paddle.full([1], kind.largest) + ADDED


@dataclass(frozen=True)
class Backward:
    """How gradients are made: which products round the output's gradient, in which format, and how ranks agree on its
    scale (one for a tensor)."""

    rotated: bool
    rounds_for_inputs: bool
    rounds_for_weights: bool
    kind: Kind
    everywhere: Callable[[paddle.Tensor], paddle.Tensor]
    saw: Callable[[paddle.Tensor, Float8], None]  # is shown what was rounded, and the result
    lost: Callable[[str], None]  # is told of what is not finite, of which NaN is made
    name: str  # of the module


def straight_through(
    x_TD: paddle.Tensor, weight: paddle.Tensor, codes: Float8, held: Float8, *, backward: Backward
) -> paddle.Tensor:  # fmt: skip
    """The product [T, F] of x and weight, [D, F] or [E, D, F], by their FP8 `codes`, with scales [E], and `held`."""
    return _Product.apply(x_TD, weight, codes, held, backward)


def per_row(scale_E: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """The scale of every row, [T, 1]; of a linear layer, one for all."""
    scale_E = scale_E.reshape([-1])
    return scale_E if len(counts) == 1 else scale_E.repeat_interleave(paddle.to_tensor(counts)).unsqueeze(-1)


def rounded_rows(
    rows_TD: paddle.Tensor, scale_E: paddle.Tensor, counts: list[int], *, name: str, lost: Callable[[str], None]
) -> Float8:  # fmt: skip
    """Rows in FP8 by the scales of their experts, [E], rows or none. `lost` is told of what is not finite, with the
    `name` of the rows; NaN is made of it."""
    scaled_TD = rows_TD / per_row(scale_E, counts)
    made = quantise_or_nan(scaled_TD, Tensor(), tell=lost, scale=paddle.ones([1]), name=name)
    return replace(made, scales=scale_E, counts=counts)


def rounded_product(codes: Float8, held: Float8) -> paddle.Tensor:
    """(Q_x Q_w) s_x s_w, [T, F] in fp32."""
    y_TF = product(_unscaled(codes), _unscaled(held), counts=codes.counts, out="fp32")
    return y_TF * per_row(codes.scales * held.scales.reshape([-1]), codes.counts)


def _unscaled(given: Float8) -> Float8:
    """The numbers that codes are without their scales, which are multiplied in afterwards; rows as one matrix."""
    if given.codes.ndim == 3:
        return replace(given, scales=paddle.ones([len(given.codes), 1, 1]))
    return replace(given, scales=paddle.ones([1, 1]), counts=[len(given.codes)])


class _Product(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weight, codes: Float8, held: Float8, backward: Backward):
        ctx.wanted, ctx.held, ctx.way = wanted(x_TD, weight), held, backward
        ctx.counts, ctx.shape = codes.counts, weight.shape
        ctx.save_for_backward(codes.codes if backward.rounds_for_weights else x_TD, codes.scales)
        return rounded_product(codes, held).astype(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_TF):
        saved_TD, scale_E = ctx.saved_tensor()
        way, counts = ctx.way, ctx.counts
        rounded = _rounded(grad_TF, counts, way) if way.rounds_for_inputs or way.rounds_for_weights else None
        grad_x = grad_weight = None
        if ctx.wanted[0]:
            grad_x = _input_gradient(grad_TF, rounded if way.rounds_for_inputs else None, ctx.held, counts)
            grad_x = (rotate(grad_x) if way.rotated else grad_x).astype(grad_TF.dtype)
        if ctx.wanted[1] and rounded is not None and way.rounds_for_weights:
            grad_weight = _rounded_weight_gradient(saved_TD, scale_E, rounded)
            grad_weight = rotate_inputs(grad_weight) / SIZE if way.rotated else grad_weight
        elif ctx.wanted[1]:
            grad_weight = _weight_gradient(saved_TD, grad_TF, counts)
        if grad_weight is not None:
            grad_weight = grad_weight.reshape(ctx.shape).astype(grad_TF.dtype)
        return grad_x, grad_weight


def _rounded(grad_TF: paddle.Tensor, counts: list[int], way: Backward) -> Float8:
    """The gradient of the output in FP8, with one scale for all rows of all ranks."""
    amax = grad_TF.abs().max().reshape([1]) if grad_TF.size else paddle.zeros([1])
    scale = scale_of(way.everywhere(amax.astype("float32")), way.kind)
    name = f"the gradient of the output of {way.name}"
    made = quantise_or_nan(grad_TF, Tensor(), tell=way.lost, kind=way.kind, scale=scale, name=name)
    way.saw(grad_TF, made)
    return replace(made, scales=scale, counts=counts)


def _input_gradient(
    grad_TF: paddle.Tensor, rounded: Float8 | None, held: Float8, counts: list[int]
) -> paddle.Tensor:  # fmt: skip
    """g Q_w^T times the weight's scale, still rotated."""
    weight_scale = per_row(held.scales, counts)
    if rounded is None:
        return _dense_product(grad_TF, held, counts) * weight_scale
    made_TD = product(_unscaled(rounded), _unscaled(held), turned=True, counts=counts, out="fp32")
    return made_TD * (weight_scale * rounded.scales)


def _dense_product(grad_TF: paddle.Tensor, held: Float8, counts: list[int]) -> paddle.Tensor:
    """g Q_w^T; one expert's codes are dense at a time."""
    numbers = held.codes.view(held.kind.name)
    stack = numbers if numbers.ndim == 3 else numbers.unsqueeze(0)
    out = [
        paddle.matmul(grad_TF[rows], stack[expert].astype(grad_TF.dtype), transpose_y=True)
        for expert, rows in rows_of_experts(counts)
    ]
    return paddle.concat(out) if out else paddle.zeros([0, stack.shape[1]], grad_TF.dtype)


def _weight_gradient(x_TD: paddle.Tensor, grad_TF: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """x^T g of every expert, [E, D, F]."""
    made = [paddle.zeros([x_TD.shape[1], grad_TF.shape[1]], grad_TF.dtype)] * len(counts)
    for expert, rows in rows_of_experts(counts):
        made[expert] = paddle.matmul(x_TD[rows], grad_TF[rows], transpose_x=True)
    return paddle.stack(made)


def _rounded_weight_gradient(codes_TD: paddle.Tensor, scale_E: paddle.Tensor, rounded: Float8) -> paddle.Tensor:
    """Q_x^T Q_g times both scales, still rotated."""
    x = _unscaled(Float8(codes_TD, scale_E, Tensor(), E4M3, rounded.counts))
    made_EDF = weight_product(x, _unscaled(rounded), counts=rounded.counts)
    return made_EDF * (scale_E * rounded.scales).reshape([-1, 1, 1])
