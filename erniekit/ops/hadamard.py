"""Rotations of every 32 neighbours by Sylvester's Hadamard matrix, not normalised: H = H^T, H H^T = 32 I.

An outlier is spread over 32 numbers, so a scale made for the largest serves the others better. x H times H^T w is
32 x w: who quantises both divides a scale by 32. Blocks of 32 must not straddle what ranks hold.
Shapes: D rotated, F left as it is.
"""

from __future__ import annotations

import paddle

from erniekit.ops.arrays.hadamard import SIZE, sylvester
from erniekit.ops.cpu import hadamard as cpu
from erniekit.ops.dispatch import backend


def rotate_plain(x_D: paddle.Tensor) -> paddle.Tensor:
    """The plain twin of `rotate`."""
    h = paddle.to_tensor(sylvester()).astype(x_D.dtype)
    return paddle.matmul(x_D.reshape([-1, SIZE]), h).reshape(x_D.shape)


def rotate(x_D: paddle.Tensor) -> paddle.Tensor:
    """x H along the last dimension [..., D], a multiple of 32; its gradient is the same rotation."""
    assert x_D.shape[-1] % SIZE == 0, f"{x_D.shape[-1]} numbers are not blocks of {SIZE}"
    return cpu.rotate(x_D) if backend(x_D) == "cpu" else rotate_plain(x_D)


def rotate_inputs_plain(weight_DF: paddle.Tensor) -> paddle.Tensor:
    """The plain twin of `rotate_inputs`."""
    h = paddle.to_tensor(sylvester()).astype(weight_DF.dtype)
    return paddle.matmul(h, weight_DF.reshape([-1, SIZE, weight_DF.shape[-1]])).reshape(weight_DF.shape)


def rotate_inputs(weight_DF: paddle.Tensor) -> paddle.Tensor:
    """H^T w along the inputs of a weight [D, F] or of stacked weights [E, D, F]; its gradient is the same rotation."""
    assert weight_DF.shape[-2] % SIZE == 0, f"{weight_DF.shape[-2]} inputs are not blocks of {SIZE}"
    return cpu.rotate_inputs(weight_DF) if backend(weight_DF) == "cpu" else rotate_inputs_plain(weight_DF)
