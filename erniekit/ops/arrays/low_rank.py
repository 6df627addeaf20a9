"""What low-rank adapters add to the product of the base (csrc/low_rank.cpp).

Shapes: T rows sorted by expert, D in, F out, E experts, R rank.
"""

from __future__ import annotations

import numpy as np

from erniekit.ops.arrays.dense import Wanted
from erniekit.ops.arrays.experts import rows_of_experts
from erniekit.ops.arrays.product import matmul


def low_rank_forward(
    x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, counts: np.ndarray, hidden: np.ndarray,
    out: np.ndarray, num_experts: int, size: int, rank: int, width: int, scale: float,
) -> None:  # fmt: skip
    """hidden = scale * x a_e, kept for backward; out = y + hidden b_e."""
    x_TD, out_TF = x.reshape(-1, size), out.reshape(-1, width)
    a_EDR, b_ERF = a.reshape(num_experts, size, rank), b.reshape(num_experts, rank, width)
    out[:] = y
    for e, rows in rows_of_experts(counts):
        matmul(x_TD[rows], a_EDR[e], hidden[rows])
    hidden *= np.float32(scale)
    for e, rows in rows_of_experts(counts):
        matmul(hidden[rows], b_ERF[e], out_TF[rows], add=True)


def low_rank_backward(
    x: np.ndarray, a: np.ndarray, b: np.ndarray, counts: np.ndarray, hidden: np.ndarray, grad: np.ndarray,
    grad_x: Wanted, grad_a: Wanted, grad_b: Wanted, num_experts: int, size: int, rank: int, width: int, scale: float,
) -> None:  # fmt: skip
    """The gradients of the rows and of both factors; that of y is the output's."""
    x_TD, grad_TF = x.reshape(-1, size), grad.reshape(-1, width)
    a_EDR, b_ERF = a.reshape(num_experts, size, rank), b.reshape(num_experts, rank, width)
    grad_hidden = np.empty_like(hidden)
    for e, rows in rows_of_experts(counts):
        matmul(grad_TF[rows], b_ERF[e].T, grad_hidden[rows])
    grad_hidden *= np.float32(scale)
    for e, rows in rows_of_experts(counts):
        if grad_b is not None:
            matmul(hidden[rows].T, grad_TF[rows], grad_b.reshape(b_ERF.shape)[e])
        if grad_a is not None:
            matmul(x_TD[rows].T, grad_hidden[rows], grad_a.reshape(a_EDR.shape)[e])
        if grad_x is not None:
            matmul(grad_hidden[rows], a_EDR[e].T, grad_x.reshape(x_TD.shape)[rows])
