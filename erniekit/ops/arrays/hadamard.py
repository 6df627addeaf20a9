"""Rotations of every 32 neighbours by Sylvester's Hadamard matrix, not normalised (csrc/hadamard.cpp)."""

from __future__ import annotations

import numpy as np

from erniekit.ops.arrays.threads import spread_rows

SIZE = 32


def sylvester() -> np.ndarray:
    """The matrix H [32, 32] in fp32: H = H^T, H H^T = 32 I."""
    h = np.ones([1, 1], np.float32)
    while len(h) < SIZE:
        h = np.block([[h, h], [h, -h]])
    return h


def rotate(x: np.ndarray, y: np.ndarray, blocks: int) -> None:
    """Every 32 neighbours of a row."""
    x_BN, y_BN, h = x.reshape(blocks, SIZE), y.reshape(blocks, SIZE), sylvester()

    def work(rows: slice) -> None:
        np.matmul(x_BN[rows], h, out=y_BN[rows])

    spread_rows(blocks, SIZE, work)


def rotate_columns(x: np.ndarray, y: np.ndarray, blocks: int, columns: int) -> None:
    """Every 32 neighbours of a column; `blocks` times 32 rows. Sums are made in the order of the compiled kernel: the
    same bits."""
    x_BNC, y_BNC = x.reshape(blocks, SIZE, columns), y.reshape(blocks, SIZE, columns)

    def work(part: slice) -> None:
        made = y_BNC[part]
        made[...] = x_BNC[part]
        step = 1
        while step < SIZE:
            pairs = made.reshape(len(made), SIZE // (2 * step), 2, step, columns)
            low, high = pairs[:, :, 0], pairs[:, :, 1]
            total = low + high
            np.subtract(low, high, out=high)
            low[...] = total
            step *= 2

    spread_rows(blocks, SIZE * columns, work)


def rotated_inputs(weight_DF: np.ndarray) -> np.ndarray:
    """H w of a weight [in, out]."""
    weight, made = np.ascontiguousarray(weight_DF, np.float32), np.empty(weight_DF.shape, np.float32)
    rotate_columns(weight, made, len(weight) // SIZE, weight.shape[1])
    return made
