"""Views: how one piece of a model is seen inside a stored tensor.

A view function takes a tensor's array and returns a numpy *view* of it (slices, transposes, axis splits; never a copy),
so the same function reads a piece out of a tensor and writes it into one. Later, a rank that holds a slice of a piece
slices the view and touches only those pages of the file.

Every piece is seen as [out, in] (a bias as [out]); query, key and value projections as [heads, head_dim, in], because
per-head storage cannot be seen as [out, in] without a copy. Knows no model, no name and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

View = Callable[[np.ndarray], np.ndarray]

# A transposing copy is fastest in small blocks: strips of 16 that are contiguous in the source, over 512 target rows
# that stay in the cache until their lines are full. 1.2-3.3 GB/s where a plain numpy copy makes 0.3-0.8 (bfloat16,
# 1,024 x 3,072 to 8,192 x 28,672, one core).
_STRIP, _ROWS = 16, 512


def whole(array: np.ndarray) -> np.ndarray:
    """The tensor is the piece."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """The tensor is stored [in, out] (a bias is its own transpose)."""
    return array.T


def columns(start: int, stop: int) -> View:
    """The piece is a range of the out axis of a fused tensor [in, all outs] (of a fused bias [all outs])."""
    return lambda array: array[..., start:stop].T


def split_heads(view: View, heads: int) -> View:
    """Another view's [out, ...], with its out axis split into [heads, head_dim]."""

    def seen(array: np.ndarray) -> np.ndarray:
        piece = view(array)
        return piece.reshape(heads, piece.shape[0] // heads, *piece.shape[1:])

    return seen


def head_triplets(which: int, heads: int) -> View:
    """The piece is q (0), k (1) or v (2) of a tensor [in, heads x (q, k, v) x head_dim]."""

    def seen(array: np.ndarray) -> np.ndarray:
        split = array.reshape(*array.shape[:-1], heads, 3, array.shape[-1] // (3 * heads))
        return np.moveaxis(split[..., which, :], (-2, -1), (0, 1))

    return seen


def expert(index: int, view: View) -> View:
    """Another view of one expert in a stacked tensor [experts, ...]."""
    return lambda array: view(array[index])


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """Copy `source` into the view `target`, converting the number format (bfloat16 rounds to nearest even)."""
    source = source.reshape(target.shape)
    order = np.argsort([-abs(stride) for stride in target.strides], kind="stable")
    target, source = target.transpose(order), source.transpose(order)
    if target.ndim < 2 or abs(source.strides[-1]) == min(abs(stride) for stride in source.strides):
        target[...] = source
        return
    step = max(1, _ROWS // math.prod(target.shape[1:-1]))
    for first in range(0, target.shape[0], step):
        rows, source_rows = target[first : first + step], source[first : first + step]
        for start in range(0, target.shape[-1], _STRIP):
            strip = np.s_[..., start : start + _STRIP]
            rows[strip] = source_rows[strip]
