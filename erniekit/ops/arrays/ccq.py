"""Weights in the convolutional code of arXiv 2507.07145, 2.0625 and 2.5 bits each: back to fp32, and nearest codewords.

Neighbouring weights share bits: a code is cut into windows that overlap, and each window is a weight. A column (an
output) has scales of its own, and 64 of its inputs share one more. The formulas are those of FastDeploy's decoder.

* wint2. A byte stands for four weights: code = floor(byte * code_scale + code_zp + 0.5) in fp32, rounded after every
  operation; its windows of six bits at shifts 9, 6, 3, 0, less 32, are the weights, times (local scale * super scale).
  A local scale has four bits; a byte holds those of 128 rows, the first 64 in its high half.
* wint2.5. Ten words of 16 bits stand for 64 weights. A word is 7 + 9 bits: three and four windows of three bits, each
  sharing one bit with the next. The tenth holds the 64th weight in its top three bits and the local scale below.

As packed weights (ops/packed.py) lie: wint2 has [in / 4 + ceil(in / 128), out] bytes, codes and then local scales, and
[3, out] scales: code_scale, code_zp, super_scale; wint2.5 has the bytes of its words, [in / 64 * 20, out], and super
scales [1, out]. `in` is a multiple of 64.

`wint2_nearest` and `wint25_nearest` find the codewords with the least sum of h (x - scale * v)^2 and what scales can be
fitted from: for each group of a column the sums of h x v (`xv`) and of h v v (`vv`), v the codeword's whole numbers.
Shapes: D inputs, F outputs, G groups of 64 inputs, B bytes or words. csrc/ccq.h and csrc/ccq.cpp are the fast twins.
"""

from __future__ import annotations

import numpy as np

from erniekit.ops.arrays.threads import spread

GROUP = 64  # rows with the same local scale
WINT2_SHIFTS = np.array([9, 6, 3, 0])
WINT25_SHIFTS = np.array([13, 11, 9, 6, 4, 2, 0])
WORDS = 10  # of wint2.5 for a group


def wint2_windows(code_scale_F: np.ndarray, code_zp_F: np.ndarray, codes_BF: np.ndarray) -> np.ndarray:
    """The four whole numbers [4, B, F], -32 to 31, that each byte stands for."""
    places_BF = np.floor(codes_BF.astype(np.float32) * code_scale_F + code_zp_F + np.float32(0.5)).astype(np.int32)
    return (places_BF >> WINT2_SHIFTS[:, None, None] & 63) - 32


def wint2_dense(codes_BF: np.ndarray, scales_3F: np.ndarray, out_DF: np.ndarray, num_in: int, first: int) -> None:
    """out = the dense weight from row `first` on, as many rows as it has place for; both are multiples of 64."""
    quads = np.arange(first // 4, (first + len(out_DF)) // 4)
    windows = wint2_windows(scales_3F[0], scales_3F[1], codes_BF[quads]).transpose(1, 0, 2)
    groups = np.arange(first // GROUP, (first + len(out_DF)) // GROUP)
    halves_GF = codes_BF[num_in // 4 + groups // 2] >> ((groups + 1) % 2 * 4).astype(np.uint8)[:, None] & 15
    scale_GF = halves_GF.astype(np.float32) * scales_3F[2]
    blocks = windows.astype(np.float32).reshape(len(groups), GROUP, -1) * scale_GF[:, None]
    out_DF[:] = blocks.reshape(out_DF.shape)


def wint25_windows(words_BF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights [G, 64, F] as whole numbers, -4 to 3, and the local scales [G, F] of 0 to 8191."""
    words = words_BF.reshape(-1, WORDS, words_BF.shape[1]).astype(np.int32)
    first = (words[:, :9, None] >> WINT25_SHIFTS[:, None] & 7).reshape(len(words), 63, -1)
    return np.concatenate([first, words[:, 9:] >> 13], 1) - 4, words[:, 9] & 0x1FFF


def wint25_dense(codes_BF: np.ndarray, scales_1F: np.ndarray, out_DF: np.ndarray, first: int) -> None:
    """out = the dense weight from row `first` on, as many rows as it has place for; both are multiples of 64."""
    num_out = out_DF.shape[1]
    words_BF = codes_BF.reshape(-1).view("<u2").reshape(-1, num_out)
    part = slice(first // GROUP * WORDS, (first + len(out_DF)) // GROUP * WORDS)
    windows, local_GF = wint25_windows(words_BF[part])
    scale_GF = local_GF.astype(np.float32) * scales_1F[0]
    out_DF[:] = (windows.astype(np.float32) * scale_GF[:, None]).reshape(out_DF.shape)


def wint2_nearest(
    x_FD: np.ndarray, h_D: np.ndarray | None, scales_GF: np.ndarray, code_scale_F: np.ndarray, code_zp_F: np.ndarray,
    codes_BF: np.ndarray | None, xv_GF: np.ndarray, vv_GF: np.ndarray, num_in: int, num_out: int,
) -> None:  # fmt: skip
    """Fill codes, if there is place for them, and sums; x is the weight's transpose."""
    every_byte = np.arange(256, dtype=np.uint8)[:, None]
    h_B4 = None if h_D is None else h_D.reshape(-1, 4)

    def work(column: int) -> None:
        book = wint2_windows(code_scale_F[column], code_zp_F[column], every_byte)[..., 0].astype(np.float32)
        x_B4 = x_FD[column].reshape(-1, 4)
        y_B4 = x_B4 * np.repeat(np.float32(1) / scales_GF[:, column], GROUP // 4)[:, None]
        if h_B4 is None:
            costs = (book * book).sum(0) / np.float32(2) - y_B4 @ book
        else:
            costs = h_B4 @ (book * book / np.float32(2)) - (h_B4 * y_B4) @ book
        best_B = costs.argmin(1)
        if codes_BF is not None:
            codes_BF[:, column] = best_B
        v_D = book.T[best_B].reshape(-1)
        _sums(x_FD[column, :, None], h_D, v_D[:, None], xv_GF[:, column, None], vv_GF[:, column, None])

    assert x_FD.shape == (num_out, num_in)
    spread(num_out, work)


def wint25_nearest(
    x_DF: np.ndarray, h_D: np.ndarray | None, scales_GF: np.ndarray, words_BF: np.ndarray | None, xv_GF: np.ndarray,
    vv_GF: np.ndarray, num_in: int, num_out: int,
) -> None:  # fmt: skip
    """Fill words, if there is place for them, and sums; the low bits of each tenth word stay zero."""

    def work(group: int) -> None:
        rows = slice(group * GROUP, (group + 1) * GROUP)
        y = x_DF[rows] * (np.float32(1) / scales_GF[group])
        h = np.ones(GROUP, np.float32) if h_D is None else h_D[rows]
        v = np.empty([GROUP, num_out], np.int32)
        for first in range(0, GROUP - 1, 7):
            for part in (slice(first, first + 3), slice(first + 3, first + 7)):
                _wint25_block(y[part], h[part], v[part])
        _wint25_block(y[63:], h[63:], v[63:])
        _sums(x_DF[rows], h, v.astype(np.float32) - 4, xv_GF[group, None], vv_GF[group, None])
        if words_BF is not None:
            bits = v[:63].reshape(9, 7, -1) << WINT25_SHIFTS[:, None]
            words_BF[group * WORDS : (group + 1) * WORDS - 1] = np.bitwise_or.reduce(bits, 1)
            words_BF[(group + 1) * WORDS - 1] = v[63] << 13

    assert x_DF.shape == (num_in, num_out)
    spread(num_in // GROUP, work)


def _wint25_block(y_WF: np.ndarray, h_W: np.ndarray, v_WF: np.ndarray) -> None:
    """The best windows of blocks whose windows share bits: from the last window back, the least cost of what follows
    for both values of the bit shared with the window before."""
    levels = np.arange(8, dtype=np.float32)[:, None] - 4
    rest, choices = np.zeros([2, y_WF.shape[1]], np.float32), []
    for y_F, h in zip(y_WF[::-1], h_W[::-1], strict=True):
        costs = (h * (y_F - levels) ** 2).reshape(2, 2, 2, -1) + rest  # by first, middle and shared last bit
        costs = costs.reshape(2, 4, -1)
        best = costs.argmin(1)
        choices.append(best)
        rest = np.take_along_axis(costs, best[:, None], 1)[:, 0]
    shared = (rest[1] < rest[0]).astype(np.int64)
    for v_F, best in zip(v_WF, reversed(choices), strict=True):
        v_F[:] = shared * 4 + np.take_along_axis(best, shared[None], 0)[0]
        shared = v_F.astype(np.int64) & 1


def _sums(x: np.ndarray, h: np.ndarray | None, v: np.ndarray, xv: np.ndarray, vv: np.ndarray) -> None:
    """xv and vv of groups [G, F] from rows [D, F]."""
    v = v.astype(np.float64).reshape(len(xv), GROUP, -1)
    weighted = v if h is None else v * h.reshape(-1, GROUP, 1)
    xv[:] = (weighted * x.reshape(v.shape)).sum(1)
    vv[:] = (weighted * v).sum(1)
