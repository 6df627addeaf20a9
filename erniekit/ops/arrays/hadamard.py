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
    """Every 32 neighbours of a column; `blocks` times 32 rows."""
    x_BNC, y_BNC, h = x.reshape(blocks, SIZE, columns), y.reshape(blocks, SIZE, columns), sylvester()

    def work(part: slice) -> None:
        np.matmul(h, x_BNC[part], out=y_BNC[part])

    spread_rows(blocks, SIZE * columns, work)
