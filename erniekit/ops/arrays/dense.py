"""Linear layers, RMSNorm and the gated activation, forward and backward (csrc/dense.cpp).

A gradient may be None: then nobody wants it. Shapes: R rows, D and I sizes of the last dimension.
"""

from __future__ import annotations

import numpy as np

from erniekit.ops.arrays.product import matmul, rounded
from erniekit.ops.arrays.threads import column_sums, spread_rows, sum_rows

Wanted = np.ndarray | None


def linear_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, y: np.ndarray, rows: int, size: int, width: int,
    bf16: bool,
) -> None:  # fmt: skip
    """y = x @ weight (+ bias)."""
    y_RI = y.reshape(rows, width)
    if bias is not None:
        y_RI[:] = bias
    matmul(rounded(x.reshape(rows, size), bf16), rounded(weight, bf16), y_RI, add=bias is not None)


def linear_backward(
    x: Wanted, weight: np.ndarray, grad: np.ndarray, grad_x: Wanted, grad_weight: Wanted, grad_bias: Wanted,
    rows: int, size: int, width: int, bf16: bool,
) -> None:  # fmt: skip
    """The gradients of x, weight and bias. x is there if the weight's gradient is wanted."""
    grad_RI = grad.reshape(rows, width)
    right_RI = rounded(grad_RI, bf16)
    if grad_x is not None:
        matmul(right_RI, rounded(weight, bf16).T, grad_x.reshape(rows, size))
    if grad_weight is not None:
        assert x is not None
        matmul(rounded(x.reshape(rows, size), bf16).T, right_RI, grad_weight)
    if grad_bias is not None:
        grad_bias[:] = column_sums(grad_RI)


def rms_norm_forward(
    x: np.ndarray, weight: np.ndarray, y: np.ndarray, scales: np.ndarray, rows: int, size: int, eps: float
) -> None:
    """y = x * scale * weight; keeps the scales, 1 / sqrt(mean(x^2) + eps)."""
    x_RD, y_RD, scale_R1 = x.reshape(rows, size), y.reshape(rows, size), scales.reshape(rows, 1)

    def work(block: slice) -> None:
        x_D, y_D = x_RD[block], y_RD[block]
        mean = np.einsum("ij,ij->i", x_D, x_D)[:, None] / np.float32(size)
        np.divide(np.float32(1.0), np.sqrt(mean + np.float32(eps)), out=scale_R1[block])
        np.multiply(x_D, scale_R1[block], out=y_D)
        np.multiply(y_D, weight, out=y_D)

    spread_rows(rows, size, work)


def rms_norm_backward(
    x: np.ndarray, weight: np.ndarray, scales: np.ndarray, grad: np.ndarray, grad_x: Wanted, grad_weight: Wanted,
    rows: int, size: int,
) -> None:  # fmt: skip
    """With n = x * scale: grad_x = scale * (g w - n mean(g w n)), grad_weight = sum over rows of g n."""
    x_RD, grad_RD, scale_R1 = x.reshape(rows, size), grad.reshape(rows, size), scales.reshape(rows, 1)
    out_RD = None if grad_x is None else grad_x.reshape(rows, size)

    def work(block: slice) -> np.ndarray:
        x_D, scale = x_RD[block], scale_R1[block]
        made = grad_RD[block] * weight
        if out_RD is not None:
            dot = np.einsum("ij,ij->i", made, x_D)[:, None]
            pulled = x_D * (dot * scale * scale / np.float32(size))
            np.subtract(made, pulled, out=made)
            np.multiply(made, scale, out=out_RD[block])
        np.multiply(grad_RD[block], x_D, out=made)
        np.multiply(made, scale, out=made)
        return np.add.reduce(made, axis=0)

    sums = sum_rows(rows, size, work)
    if grad_weight is not None:
        grad_weight[:] = sums


def activate(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out = silu(gate) * up, of rows."""

    def work(block: slice) -> None:
        np.multiply(gate[block], _sigmoid(gate[block]), out=out[block])
        np.multiply(out[block], up[block], out=out[block])

    spread_rows(len(gate), gate.shape[1], work)


def activate_backward(
    gate: np.ndarray, up: np.ndarray, grad: np.ndarray, grad_gate: np.ndarray, grad_up: np.ndarray, act: Wanted
) -> None:
    """The gradients of gate and up; makes `act`, silu(gate) * up, again if it is wanted."""

    def work(block: slice) -> None:
        sigma = _sigmoid(gate[block])
        silu = gate[block] * sigma
        if act is not None:
            np.multiply(silu, up[block], out=act[block])
        np.multiply(grad[block], silu, out=grad_up[block])
        silu *= np.float32(1.0) - sigma
        silu += sigma
        silu *= up[block]
        np.multiply(silu, grad[block], out=grad_gate[block])

    spread_rows(len(gate), gate.shape[1], work)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    made = np.negative(x)
    np.exp(made, out=made)
    made += np.float32(1.0)
    return np.reciprocal(made, out=made)


def swiglu_forward(gate: np.ndarray, up: np.ndarray, out: np.ndarray, size: int) -> None:
    """out = silu(gate) * up."""
    column = size, 1
    activate(gate.reshape(column), up.reshape(column), out.reshape(column))


def swiglu_backward(
    gate: np.ndarray, up: np.ndarray, grad: np.ndarray, grad_gate: np.ndarray, grad_up: np.ndarray, size: int
) -> None:
    """The gradients of gate and up."""
    column = size, 1
    activate_backward(
        gate.reshape(column), up.reshape(column), grad.reshape(column), grad_gate.reshape(column),
        grad_up.reshape(column), None,
    )  # fmt: skip
