"""Weights that come quantised: a store that takes what encoders made (encoders.py, ccq.py), as a file has it.

Codes stay as they are, in the order in which the kernels of packed weights (ops/packed.py) read them; scales are spread
over the outputs. There is no gradient here for anything but what is below. Knows no file.
Shapes: D inputs, F outputs, T rows sorted by expert, C rows of codes, G rows of scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

from erniekit.ops.arrays.packed import E4M3, INT4, INT8, WINT2, WINT25
from erniekit.ops.packed import packed_product, unpack
from erniekit.precision.ccq import Wint2, Wint25
from erniekit.precision.encoders import BLOCK, SCALE, W4A8, WEIGHT, Encoder, Float8, Float8Blocks, Integers
from erniekit.precision.packed import put


class StoredCodes:
    """Encoded weights of one shape [D, F] (precision/packed.py: Store). Memory is taken when the first one comes."""

    def __init__(self, encoder: Encoder, shape: tuple[int, int, int], *, dtype: str) -> None:
        self.encoder, self.shape, self.dtype, self.kind = encoder, shape, dtype, _kernel_kind(encoder)
        self.codes = self.scales = paddle.empty([0])

    def take(self, index: int, arrays: Mapping[str, np.ndarray], columns: np.ndarray | None) -> None:
        """Keep an encoded weight, or these outputs of it."""
        codes_CF, scales_GF = _as_kernels_read(self.encoder, arrays, columns)
        if not self.codes.size:
            self.codes = paddle.empty([self.shape[0], *codes_CF.shape], str(codes_CF.dtype))
            self.scales = paddle.empty([self.shape[0], *scales_GF.shape], "float32")
        put(self.codes[index], codes_CF)
        put(self.scales[index], scales_GF)

    def dense(self, index: int) -> paddle.Tensor:
        """See Store."""
        made = unpack(self.codes[index], self.scales[index], num_in=self.shape[1], kind=self.kind)
        return made.astype(self.dtype)

    def product(self, x_TD: paddle.Tensor, counts: list[int], *, bf16: bool) -> paddle.Tensor:
        """See Store."""
        return packed_product(x_TD, self.codes, self.scales, counts=counts, kind=self.kind, bf16=bf16)

    def num_bytes(self) -> int:
        """What the codes and scales take in memory."""
        return sum(int(x.size) * x.element_size() for x in (self.codes, self.scales))


def _kernel_kind(encoder: Encoder) -> int:
    if isinstance(encoder, Integers):
        return INT8 if encoder.kind == "int8" else INT4
    if isinstance(encoder, (Wint2, Wint25)):
        return WINT2 if isinstance(encoder, Wint2) else WINT25
    assert isinstance(encoder, (Float8, Float8Blocks)), encoder
    return E4M3


def _as_kernels_read(
    encoder: Encoder, arrays: Mapping[str, np.ndarray], columns: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [C, F] and fp32 scales [G, F] of all outputs, or of some."""
    if isinstance(encoder, (Wint2, Wint25)):
        return encoder.packed({name: _picked(array, columns) for name, array in arrays.items()})
    codes, scales = _picked(arrays[WEIGHT], columns), arrays[SCALE]
    if isinstance(encoder, Float8Blocks):
        scales = scales[:, (np.arange(codes.shape[1]) if columns is None else columns) // BLOCK]
    elif isinstance(encoder, Float8):
        scales = np.broadcast_to(scales, [1, codes.shape[1]])
    else:
        scales = np.atleast_2d(_picked(scales, columns))
    if isinstance(encoder, W4A8):
        scales = encoder.steps(scales)
    if not isinstance(encoder, Integers):
        codes = codes.view(np.uint8)
    return codes, np.ascontiguousarray(scales)


def _picked(array: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    return array if columns is None else np.ascontiguousarray(array[..., columns])
