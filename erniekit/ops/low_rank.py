"""The product of a low-rank adapter, added to that of the base: y + scale * (x A) B.

One operator for linear layers and for routed experts (a linear layer is one expert with all the rows), so that neither
W + scale * A B nor any other matrix of the base's size is ever made, forward or backward.
Shapes: T rows sorted by expert, D in, F out, E experts, R rank; `...` any leading dimensions.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu import low_rank as cpu
from erniekit.ops.dispatch import backend
from erniekit.ops.grouped import grouped_linear_plain


def grouped_low_rank_plain(
    x_TD: paddle.Tensor, y_TF: paddle.Tensor, a_EDR: paddle.Tensor, b_ERF: paddle.Tensor, *, counts: list[int],
    scale: float,
) -> paddle.Tensor:  # fmt: skip
    """The plain twin of `grouped_low_rank`."""
    hidden_TR = grouped_linear_plain(x_TD, a_EDR, counts=counts) * scale
    return y_TF + grouped_linear_plain(hidden_TR, b_ERF, counts=counts)


def grouped_low_rank(
    x_TD: paddle.Tensor, y_TF: paddle.Tensor, a_EDR: paddle.Tensor, b_ERF: paddle.Tensor, *, counts: list[int],
    scale: float,
) -> paddle.Tensor:  # fmt: skip
    """y + scale * (x A_e) B_e for rows sorted by expert; `counts[e]` rows belong to expert e."""
    chosen = cpu.grouped_low_rank if backend(x_TD, y_TF, a_EDR, b_ERF) == "cpu" else grouped_low_rank_plain
    return chosen(x_TD, y_TF, a_EDR, b_ERF, counts=counts, scale=scale)


def low_rank_plain(
    x_D: paddle.Tensor, y_F: paddle.Tensor, a_DR: paddle.Tensor, b_RF: paddle.Tensor, *, scale: float
) -> paddle.Tensor:
    """The plain twin of `low_rank`."""
    return y_F + paddle.matmul(paddle.matmul(x_D, a_DR) * scale, b_RF)


def low_rank(
    x_D: paddle.Tensor, y_F: paddle.Tensor, a_DR: paddle.Tensor, b_RF: paddle.Tensor, *, scale: float
) -> paddle.Tensor:
    """y + scale * (x A) B; x [..., D], y [..., F]."""
    chosen = cpu.low_rank if backend(x_D, y_F, a_DR, b_RF) == "cpu" else low_rank_plain
    return chosen(x_D, y_F, a_DR, b_RF, scale=scale)
