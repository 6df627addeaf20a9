"""Weights in the convolutional code of arXiv 2507.07145, 2.0625 and 2.5 bits each: back to fp32.

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
Shapes: D inputs, F outputs, G groups of 64 inputs, B bytes or words. csrc/ccq.h is the fast twin.
"""

from __future__ import annotations

import numpy as np

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
