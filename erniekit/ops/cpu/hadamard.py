"""Hadamard rotations on their kernels (csrc/hadamard.cpp); a rotation is its own gradient.

Shapes: D rotated, F left as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle

from erniekit.ops.arrays.hadamard import SIZE
from erniekit.ops.cpu.library import call


def _rotated(x_D: paddle.Tensor) -> paddle.Tensor:
    y_D = paddle.empty(x_D.shape, "float32")
    call("rotate", x_D.contiguous(), y_D, x_D.size // SIZE)
    return y_D


def _rotated_inputs(weight_DF: paddle.Tensor) -> paddle.Tensor:
    y_DF, width = paddle.empty(weight_DF.shape, "float32"), weight_DF.shape[-1]
    call("rotate_columns", weight_DF.contiguous(), y_DF, weight_DF.size // (SIZE * max(width, 1)), width)
    return y_DF


class _Rotate(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x, rotated: Callable[[paddle.Tensor], paddle.Tensor]):
        ctx.rotated = rotated
        return rotated(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.rotated(grad)


def rotate(x_D: paddle.Tensor) -> paddle.Tensor:
    """Every 32 neighbours of the last dimension."""
    return _Rotate.apply(x_D, _rotated)


def rotate_inputs(weight_DF: paddle.Tensor) -> paddle.Tensor:
    """Every 32 neighbours of the last dimension but one."""
    return _Rotate.apply(weight_DF, _rotated_inputs)
