"""Weights that come quantised: a store that takes what encoders made (encoders.py, ccq.py), as a file has it.

Codes stay as they are, in the order in which the kernels of packed weights (ops/packed.py) read them; scales are spread
over the outputs. There is no gradient here for anything but what is below. Knows no file.
Shapes: D inputs, F outputs, T rows sorted by expert, C rows of codes, G rows of scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

from erniekit.ops import float8
from erniekit.ops.arrays.packed import E4M3, INT4, INT8, WINT2, WINT25
from erniekit.ops.hadamard import rotate, rotate_inputs
from erniekit.ops.packed import packed_product, unpack
from erniekit.ops.straight_through import rounded_product, rounded_rows
from erniekit.precision.ccq import Wint2, Wint25
from erniekit.precision.encoders import (
    ACTIVATION_SCALE,
    BLOCK,
    SCALE,
    W4A8,
    WEIGHT,
    Encoder,
    Float8,
    Float8Blocks,
    Float8Qat,
    Integers,
)
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


class QatCodes(StoredCodes):
    """Codes of quantisation-aware training with the fixed scales of their inputs: products as training made them, to
    the last bit."""

    def __init__(self, encoder: Float8Qat, shape: tuple[int, int, int], *, dtype: str) -> None:
        super().__init__(encoder, shape, dtype=dtype)
        self.rotated = encoder.rotated
        self.codes, self.scales = paddle.empty(list(shape), "uint8"), paddle.ones([shape[0], 1, 1])
        self.inputs_E = paddle.ones([shape[0]])

    def take(self, index: int, arrays: Mapping[str, np.ndarray], columns: np.ndarray | None) -> None:
        """See StoredCodes."""
        put(self.codes[index], _picked(arrays[WEIGHT], columns).view(np.uint8))
        for stored, name in ((self.scales, SCALE), (self.inputs_E, ACTIVATION_SCALE)):
            stored[index] = float(arrays[name].item())

    def dense(self, index: int) -> paddle.Tensor:
        """See Store."""
        made = float8.dense(self._held(slice(index, index + 1)))[0]
        return (rotate_inputs(made) if self.rotated else made).astype(self.dtype)

    def product(self, x_TD: paddle.Tensor, counts: list[int], *, bf16: bool) -> paddle.Tensor:  # noqa: ARG002 - is FP8
        """See Store."""
        rows_TD = rotate(x_TD) if self.rotated else x_TD
        codes = rounded_rows(rows_TD, self.inputs_E, counts, name="the input of a product")
        return rounded_product(codes, self._held(slice(None))).astype(x_TD.dtype)

    def _held(self, which: slice) -> float8.Float8:
        codes = self.codes[which]
        rows = [self.shape[1]] * codes.shape[0]
        return float8.Float8(codes, self.scales[which], float8.Tensor(), float8.E4M3, rows)


def store_of(encoder: Encoder, shape: tuple[int, int, int], *, dtype: str) -> StoredCodes:
    """An empty store for the weights of an encoder."""
    if isinstance(encoder, Float8Qat):
        return QatCodes(encoder, shape, dtype=dtype)
    return StoredCodes(encoder, shape, dtype=dtype)


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
