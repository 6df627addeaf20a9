"""Routed experts: sort rows by expert, copy them there, one gated MLP per expert, and back (csrc/experts.cpp).

Shapes: M tokens, C choices, T = M*C routed rows, E experts, I width, D hidden size. `place[m, c]` is the sorted row of
a routed row, `token[r]` the token of a sorted row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from erniekit.ops.arrays.dense import Wanted, activate, activate_backward
from erniekit.ops.arrays.product import matmul, rounded
from erniekit.ops.arrays.threads import spread_rows


def sort_by_expert(
    experts: np.ndarray, token: np.ndarray, place: np.ndarray, counts: np.ndarray, routed: int, choices: int,
    num_experts: int,
) -> int:  # fmt: skip
    """A stable sort of the routed rows by expert. Returns the index of an id that is no expert, or -1."""
    ids_T = experts.reshape(routed)
    wrong_T = (ids_T < 0) | (ids_T >= num_experts)
    if wrong_T.any():
        return int(wrong_T.argmax())
    order_T = np.argsort(ids_T, kind="stable")
    counts[:] = np.bincount(ids_T, minlength=num_experts)
    place.reshape(routed)[order_T] = np.arange(routed)
    np.floor_divide(order_T, choices, out=token)
    return -1


def permute(x: np.ndarray, token: np.ndarray, y: np.ndarray, routed: int, size: int) -> None:
    """y[r] = x[token[r]]"""
    spread_rows(routed, size, lambda block: _take(x, token[block], y[block]))


def combine(
    x: np.ndarray, weights: np.ndarray | None, place: np.ndarray, y: np.ndarray, tokens: int, choices: int, size: int
) -> None:
    """y[m] = sum over c of weights[m, c] * x[place[m, c]]; without weights, a plain sum."""

    def work(block: slice) -> None:
        chosen = np.empty_like(y[block])
        for c in range(choices):
            _take(x, place[block, c], chosen)
            if weights is not None:
                np.multiply(chosen, weights[block, c, None], out=chosen)
            np.add(y[block] if c else np.float32(0.0), chosen, out=y[block])

    spread_rows(tokens, size, work)


def combine_backward(
    x: np.ndarray, weights: np.ndarray, place: np.ndarray, grad: np.ndarray, grad_x: np.ndarray,
    grad_weights: np.ndarray, tokens: int, choices: int, size: int,
) -> None:  # fmt: skip
    """The gradients of the rows and of their weights."""

    def work(block: slice) -> None:
        chosen = np.empty_like(grad[block])
        for c in range(choices):
            rows = place[block, c]
            _take(x, rows, chosen)
            np.einsum("ij,ij->i", chosen, grad[block], out=grad_weights[block, c])
            np.multiply(grad[block], weights[block, c, None], out=chosen)
            grad_x[rows] = chosen

    spread_rows(tokens, size, work)


def _take(x: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    np.take(x, rows, axis=0, out=out, mode="clip")  # all are inside: the other modes copy once more


def experts_forward(
    x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, counts: np.ndarray, hidden: np.ndarray, y: np.ndarray,
    _num_experts: int, _size: int, width: int, bf16: bool,
) -> None:  # fmt: skip
    """y = down_e(silu(gate) * up) of each expert's rows; hidden [T, 2 * width] is kept for backward."""
    x, act = rounded(x, bf16), np.empty([len(x), width], np.float32)
    for e, rows in rows_of_experts(counts):
        matmul(x[rows], rounded(gate_up[e], bf16), hidden[rows])
    activate(hidden[:, :width], hidden[:, width:], act)
    act = rounded(act, bf16)
    for e, rows in rows_of_experts(counts):
        matmul(act[rows], rounded(down[e], bf16), y[rows])


def experts_backward(
    x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, counts: np.ndarray, hidden: np.ndarray, grad: np.ndarray,
    grad_x: Wanted, grad_gate_up: Wanted, grad_down: Wanted, _num_experts: int, _size: int, width: int, bf16: bool,
) -> None:  # fmt: skip
    """The gradients of the rows and of both stacked weights."""
    act, grad_act = (np.empty([len(x), width], np.float32) for _ in range(2))
    grad_hidden, grad = np.empty_like(hidden), rounded(grad, bf16)
    for e, rows in rows_of_experts(counts):
        matmul(grad[rows], rounded(down[e], bf16).T, grad_act[rows])
    gate, up = slice(None, width), slice(width, None)
    activate_backward(hidden[:, gate], hidden[:, up], grad_act, grad_hidden[:, gate], grad_hidden[:, up], act)
    x, act, grad_hidden = (rounded(operand, bf16) for operand in (x, act, grad_hidden))
    for e, rows in rows_of_experts(counts):
        if grad_down is not None:
            matmul(act[rows].T, grad[rows], grad_down[e])
        if grad_gate_up is not None:
            matmul(x[rows].T, grad_hidden[rows], grad_gate_up[e])
        if grad_x is not None:
            matmul(grad_hidden[rows], rounded(gate_up[e], bf16).T, grad_x[rows])


def gated_forward(hidden: np.ndarray, act: np.ndarray, _rows: int, width: int) -> None:
    """act = silu(first half) * second half of the rows."""
    activate(hidden[:, :width], hidden[:, width:], act)


def gated_backward(hidden: np.ndarray, grad: np.ndarray, grad_hidden: np.ndarray, _rows: int, width: int) -> None:
    """The gradient of both halves."""
    gate, up = slice(None, width), slice(width, None)
    activate_backward(hidden[:, gate], hidden[:, up], grad, grad_hidden[:, gate], grad_hidden[:, up], None)


def weighted_gated_forward(
    hidden: np.ndarray, weights: np.ndarray | None, act: np.ndarray, rows: int, width: int
) -> None:
    """act = silu(first half) * second half * weight of the rows."""
    gated_forward(hidden, act, rows, width)
    if weights is not None:
        act *= weights[:, None]


def weighted_gated_backward(
    hidden: np.ndarray, weights: np.ndarray | None, grad: np.ndarray, act: np.ndarray, grad_hidden: np.ndarray,
    grad_weights: Wanted, _rows: int, width: int,
) -> None:  # fmt: skip
    """The gradients of the rows and of their weights from that of act, which is made again."""
    gate, up = slice(None, width), slice(width, None)
    scaled = grad if weights is None else grad * weights[:, None]
    activate_backward(hidden[:, gate], hidden[:, up], scaled, grad_hidden[:, gate], grad_hidden[:, up], act)
    if weights is not None and grad_weights is not None:
        np.einsum("ij,ij->i", grad, act, out=grad_weights)
        act *= weights[:, None]


def grouped_linear_forward(
    x: np.ndarray, weight: np.ndarray, counts: np.ndarray, y: np.ndarray, _num_experts: int, _size: int, _width: int,
    bf16: bool,
) -> None:  # fmt: skip
    """y = x weight_e of each expert's rows."""
    x = rounded(x, bf16)
    for e, rows in rows_of_experts(counts):
        matmul(x[rows], rounded(weight[e], bf16), y[rows])


def grouped_linear_backward(
    x: Wanted, weight: Wanted, counts: np.ndarray, grad: np.ndarray, grad_x: Wanted, grad_weight: Wanted,
    _num_experts: int, _size: int, _width: int, bf16: bool,
) -> None:  # fmt: skip
    """The gradients of the rows and of the stacked weight. x is there if the weight's gradient is wanted, and the
    weight if that of the rows is."""
    x, grad = None if x is None else rounded(x, bf16), rounded(grad, bf16)
    for e, rows in rows_of_experts(counts):
        if grad_weight is not None:
            assert x is not None
            matmul(x[rows].T, grad[rows], grad_weight[e])
        if grad_x is not None:
            assert weight is not None
            matmul(grad[rows], rounded(weight[e], bf16).T, grad_x[rows])


def rows_of_experts(counts: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(expert, its rows), those without rows too."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        yield expert, slice(start, start + count)
        start += count
