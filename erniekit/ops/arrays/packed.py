"""Products with weights kept in few bits: back to fp32 block by block, and multiplied (csrc/packed.cpp).

A weight [in, out] is level(code) * scale. int8 codes are levels themselves, [in, out]. 4-bit codes number the levels of
a table; two rows share a row of bytes, [ceil(in / 2), out], the even row in the low half. E4M3 codes are the bits of
such numbers, [in, out]. Scales are [groups, out], for in / groups inputs each. The convolutional codes lie as
arrays/ccq.py says. Weights of E experts are stacked; rows of x come sorted by expert, counts [E].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from erniekit.ops.arrays.ccq import GROUP, wint2_dense, wint25_dense
from erniekit.ops.arrays.product import matmul, rounded
from erniekit.ops.arrays.threads import spread, spread_rows

INT8, INT4, NF4, E4M3, WINT2, WINT25 = range(6)  # the order of csrc/packed.cpp

# Quantiles of the normal distribution, exact at -1, 0 and 1 (arXiv 2305.14314, appendix E).
NORMAL_FLOAT = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
# Of every code, bit 7 the sign; exponents begin at 2^-6, and the last code of each half would be NaN.
_HALF = np.array([(8 * (e > 0) + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)], np.float32)
LEVELS = {INT4: np.arange(-8, 8, dtype=np.float32), NF4: NORMAL_FLOAT, E4M3: np.concatenate([_HALF, -_HALF])}

# Numbers that are dense at a time: for few rows a block stays in a core's cache, for many it feeds the product.
FEW, MANY, MANY_ROWS = 1 << 18, 1 << 22, 32


def unpack(
    codes: np.ndarray, scales: np.ndarray, out: np.ndarray, num_in: int, num_out: int, groups: int, kind: int,
    first: int = 0,
) -> None:  # fmt: skip
    """out = the dense weight from row `first` on, as many rows as it has place for."""
    codes_CF, scales_GF = codes.reshape(-1, num_out), scales.reshape(groups, num_out)
    if kind in (WINT2, WINT25):
        _unpack_groups(codes_CF, scales_GF, out, num_in, kind, first)
        return

    def work(block: slice) -> None:
        rows = np.arange(first + block.start, first + block.stop)
        if kind == INT8:
            out[block] = codes_CF[rows]
        elif kind == E4M3:
            np.take(LEVELS[kind], codes_CF[rows], out=out[block])
        else:
            shift = (rows % 2 * 4).astype(np.uint8)[:, None]
            np.take(LEVELS[kind], codes_CF[rows // 2] >> shift & 15, out=out[block])
        out[block] *= scales_GF[rows * groups // num_in]

    spread_rows(len(out), num_out, work)


def _unpack_groups(
    codes_CF: np.ndarray, scales_GF: np.ndarray, out: np.ndarray, num_in: int, kind: int, first: int
) -> None:
    def work(block: int) -> None:
        rows = slice(block * GROUP, (block + 1) * GROUP)
        if kind == WINT2:
            wint2_dense(codes_CF, scales_GF, out[rows], num_in, first + rows.start)
        else:
            wint25_dense(codes_CF, scales_GF, out[rows], first + rows.start)

    spread(len(out) // GROUP, work)


def packed_forward(
    x: np.ndarray, counts: np.ndarray, codes: np.ndarray, scales: np.ndarray, y: np.ndarray,
    _num_experts: int, num_in: int, num_out: int, groups: int, kind: int, bf16: bool,
) -> None:  # fmt: skip
    """y = x @ weight_e of each expert's rows."""
    x = rounded(x, bf16)
    for expert, rows in _experts_with_rows(counts):
        for block in _blocks(num_in, num_out, rows.stop - rows.start, kind):
            weight = np.empty([block.stop - block.start, num_out], np.float32)
            unpack(codes[expert], scales[expert], weight, num_in, num_out, groups, kind, block.start)
            matmul(x[rows, block], rounded(weight, bf16), y[rows], add=block.start > 0)


def packed_backward(
    grad: np.ndarray, counts: np.ndarray, codes: np.ndarray, scales: np.ndarray, grad_x: np.ndarray,
    _num_experts: int, num_in: int, num_out: int, groups: int, kind: int, bf16: bool,
) -> None:  # fmt: skip
    """grad_x = grad @ weight_e^T of each expert's rows."""
    grad = rounded(grad, bf16)
    for expert, rows in _experts_with_rows(counts):
        for block in _blocks(num_in, num_out, rows.stop - rows.start, kind):
            weight = np.empty([block.stop - block.start, num_out], np.float32)
            unpack(codes[expert], scales[expert], weight, num_in, num_out, groups, kind, block.start)
            matmul(grad[rows], rounded(weight, bf16).T, grad_x[rows, block])


def _experts_with_rows(counts: np.ndarray) -> Iterator[tuple[int, slice]]:
    stops = np.cumsum(counts)
    for expert in np.flatnonzero(counts).tolist():
        yield expert, slice(stops[expert] - counts[expert], stops[expert])


def _blocks(num_in: int, num_out: int, rows: int, kind: int) -> Iterator[slice]:
    """Rows of a weight that are dense at the same time."""
    least = GROUP if kind in (WINT2, WINT25) else 1  # rows that cannot be told apart
    step = max((MANY if rows >= MANY_ROWS else FEW) // num_out // least, 1) * least
    for first in range(0, num_in, step):
        yield slice(first, min(first + step, num_in))
