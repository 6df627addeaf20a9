"""Copying tokens to their experts and summing them back, each row read once and written once. The plain twins are
`permute_plain` and `combine_plain` of ops/grouped.py and their gradients. Knows no products.

Shapes: M tokens, C choices, T = M*C sorted rows, D numbers of a row; places [M, C]: the sorted row of each choice.
Not run on a GPU.
"""

from typing import Any

import triton
import triton.language as tl

from erniekit.ops.triton.device import stored_as
from erniekit.ops.triton.launch import EXACT, cdiv, is_dense, is_whole, strides

_ROWS, _WIDE = 8, 256


@triton.jit
def _spread(
    x, y, places, weights, rows, size, x_row, y_row,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    v = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + row * CHOICES + choice, mask=row < rows, other=0).to(tl.int64)
        out = v
        if WEIGHTED:
            weight = tl.load(weights + row * CHOICES + choice, mask=row < rows, other=0.0).to(tl.float32)
            out = stored_as(v.to(tl.float32) * weight[:, None], y)
        tl.store(y + place[:, None] * y_row + column[None, :], out, mask=inside)


@triton.jit
def _gather(
    x, y, places, weights, rows, size, x_row, y_row,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + row * CHOICES + choice, mask=row < rows, other=0).to(tl.int64)
        v = tl.load(x + place[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            v = v * tl.load(weights + row * CHOICES + choice, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        total += v
    tl.store(y + row[:, None] * y_row + column[None, :], stored_as(total, y), mask=inside)


@triton.jit
def _dots(
    x, grad, out, places, rows, size, x_row, grad_row,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choice = tl.program_id(1)
    place = tl.load(places + row * CHOICES + choice, mask=row < rows, other=0).to(tl.int64)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(0, size, WIDE):
        column = start + tl.arange(0, WIDE)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        a = tl.load(x + place[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + row * CHOICES + choice, stored_as(tl.sum(total, 1), out), mask=row < rows)


def _grid(rows: int, size: int) -> tuple[int, int]:
    return cdiv(rows, _ROWS), cdiv(size, _WIDE)


def spread(x: Any, y: Any, *, places: Any, weights: Any = None) -> None:
    """y [T, D]: row m of x [M, D] at each of the rows places[m], times weights [M, C] if they are given."""
    (rows, size), choices = x.shape, places.shape[1]
    assert is_dense(x, y) and is_whole(places, weights)
    if rows:
        _spread[_grid(rows, size)](
            x, y, places, weights, rows, size, strides(x)[0], strides(y)[0],
            CHOICES=choices, WEIGHTED=weights is not None, ROWS=_ROWS, WIDE=_WIDE, num_warps=4, **EXACT,
        )  # fmt: skip


def gather(x: Any, y: Any, *, places: Any, weights: Any = None) -> None:
    """y [M, D]: for every token the sum of its rows of x [T, D], times weights [M, C] if they are given; in fp32."""
    (rows, size), choices = y.shape, places.shape[1]
    assert is_dense(x, y) and is_whole(places, weights)
    if rows:
        _gather[_grid(rows, size)](
            x, y, places, weights, rows, size, strides(x)[0], strides(y)[0],
            CHOICES=choices, WEIGHTED=weights is not None, ROWS=_ROWS, WIDE=_WIDE, num_warps=4, **EXACT,
        )  # fmt: skip


def dots(x: Any, grad: Any, out: Any, *, places: Any) -> None:
    """out [M, C]: the scalar product of each choice's row of x [T, D] with its token's row of grad [M, D]."""
    (rows, size), choices = grad.shape, places.shape[1]
    assert is_dense(x, grad) and is_whole(out, places)
    if rows:
        _dots[(cdiv(rows, _ROWS), choices)](
            x, grad, out, places, rows, size, strides(x)[0], strides(grad)[0],
            CHOICES=choices, ROWS=_ROWS, WIDE=_WIDE, num_warps=4, **EXACT,
        )  # fmt: skip
