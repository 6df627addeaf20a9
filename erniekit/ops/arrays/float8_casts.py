"""Matrices to FP8 and back, part by part and in threads (csrc/float8.cpp).

Rows come in parts, `counts` of them: the matrices of a stack, or the rows of each expert. Blocks of `high` rows and
`wide` columns share a scale and begin anew with every part; the scales of all parts lie one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from ml_dtypes import bfloat16

from erniekit.ops.arrays.float8 import E4M3, E5M2, block_amax, decode, encode, power_of_two, spread_scales
from erniekit.ops.arrays.threads import BLOCK_NUMBERS, spread, spread_rows

_KINDS = (E4M3, E5M2)  # in the order of csrc/float8.cpp


def float8_quantise(
    x: np.ndarray, given: np.ndarray | None, counts: np.ndarray, codes: np.ndarray, scales: np.ndarray, _parts: int,
    columns: int, high: int, wide: int, whole: bool, kind: int,
) -> int:  # fmt: skip
    """Returns whether x holds NaN or infinity. `whole`: a scale for each part, given or made."""
    x, codes, scales = _matrices(x, codes, scales, columns=columns, wide=wide)
    if not all(np.isfinite(block).all() for block in np.array_split(x, max(x.size // BLOCK_NUMBERS, 1))):
        return 1

    def work(block: slice, own: slice) -> None:
        if given is None:
            scales[own] = power_of_two(block_amax(x[block], (high, wide)), _KINDS[kind])
        fitting = x[block] / spread_scales(scales[own], x[block].shape, (high, wide))
        codes[block] = encode(fitting, _KINDS[kind])

    if given is not None:
        scales.reshape(-1)[:] = given.reshape(-1)[: scales.size]
    _spread_strips(counts, columns, high, work, cut=not whole)
    return 0


def float8_dense(
    codes: np.ndarray, scales: np.ndarray, counts: np.ndarray, out: np.ndarray, _parts: int, columns: int, high: int,
    wide: int, kind: int,
) -> None:  # fmt: skip
    """The fp32 numbers that codes and scales stand for."""
    codes, out, scales = _matrices(codes, out, scales, columns=columns, wide=wide)

    def work(block: slice, own: slice) -> None:
        out[block] = decode(codes[block], _KINDS[kind]) * spread_scales(scales[own], out[block].shape, (high, wide))

    _spread_strips(counts, columns, high, work)


def finish_products(
    x: np.ndarray, factors: np.ndarray | None, counts: np.ndarray, _parts: int, columns: int, bf16: bool
) -> None:
    """x *= the factor of its part, if there is one; then, if `bf16`, the nearest bf16 numbers."""
    start = 0
    for part, count in enumerate(counts.tolist()):
        part_RC = x.reshape(-1, columns)[start : start + count]
        factor = np.float32(1.0) if factors is None else factors[part]

        def work(rows: slice, part_RC: np.ndarray = part_RC, factor: np.float32 = factor) -> None:
            product = part_RC[rows] * factor
            part_RC[rows] = product.astype(bfloat16) if bf16 else product

        spread_rows(count, columns, work)
        start += count


def _matrices(*arrays: np.ndarray, columns: int, wide: int) -> Iterator[np.ndarray]:
    """All of them [R, C], the last one [G, G]."""
    *numbers, scales = arrays
    yield from (array.reshape(-1, columns) for array in numbers)
    yield scales.reshape(-1, -(-columns // wide))


def _spread_strips(
    counts: np.ndarray, columns: int, high: int, work: Callable[[slice, slice], None], *, cut: bool = True
) -> None:
    """work(rows, their scales) on whole blocks of every part; a part at a time unless they are to be cut."""
    strips: list[tuple[slice, slice]] = []
    start = scale = 0
    for count in counts.tolist():
        step = max(BLOCK_NUMBERS // max(columns * high, 1), 1) * high if cut else max(count, 1)
        for first in range(0, count, step):
            size = min(step, count - first)
            own = -(-size // high)
            strips.append((slice(start + first, start + first + size), slice(scale, scale + own)))
            scale += own
        start += count
    spread(len(strips), lambda i: work(*strips[i]))
