"""Weights that come quantised: stores that take codes as a file has them (encoders.py), and inputs that are rounded.

All go to the kernels of packed weights (ops/packed.py): codes as they are, scales spread over the outputs. There is no
gradient for anything here, and no other number format than the encoders'. Knows no file.
Shapes: D inputs, F outputs, T rows sorted by expert, E experts, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import paddle

from erniekit.ops.arrays.packed import E4M3, INT4, INT8, WINT2, WINT25
from erniekit.ops.packed import packed_product, unpack
from erniekit.precision.ccq import Wint2, Wint25
from erniekit.precision.encoders import BLOCK, SCALE, W4A8, WEIGHT, Encoder, Float8, Float8Blocks, Integers
from erniekit.precision.packed import Store, put


@runtime_checkable
class StoredCodes(Store, Protocol):
    """A store that is given encoded weights."""

    def take(self, index: int, arrays: Mapping[str, np.ndarray], columns: np.ndarray | None) -> None:
        """Keep an encoded weight, or these outputs of it."""

    def num_bytes(self) -> int:
        """What the codes and scales take in memory."""


class KernelCodes:
    """Integers or E4M3, as ops/packed.py reads them."""

    def __init__(self, encoder: Encoder, shape: tuple[int, int, int], *, dtype: str) -> None:
        self.shape, self.dtype, self.encoder = shape, dtype, encoder
        count, num_in, num_out = shape
        eight_bits = not isinstance(encoder, Integers) or encoder.kind == "int8"
        self.kind = E4M3 if not isinstance(encoder, Integers) else INT8 if eight_bits else INT4
        rows = num_in if eight_bits else -(-num_in // 2)
        self.codes = paddle.empty([count, rows, num_out], "int8" if self.kind == INT8 else "uint8")
        self.scales = paddle.empty([count, self._groups(num_in), num_out], "float32")

    def _groups(self, num_in: int) -> int:
        if isinstance(self.encoder, Float8Blocks):
            return num_in // BLOCK
        group_size = self.encoder.group_size if isinstance(self.encoder, Integers) else None
        return num_in // (group_size or num_in)

    def take(self, index: int, arrays: Mapping[str, np.ndarray], columns: np.ndarray | None) -> None:
        """See StoredCodes."""
        codes, scales = arrays[WEIGHT], arrays[SCALE]
        picked = np.arange(codes.shape[1]) if columns is None else columns
        if isinstance(self.encoder, Float8Blocks):
            scales = scales[:, picked // BLOCK]
        elif isinstance(self.encoder, Float8):
            scales = np.broadcast_to(scales, [1, len(picked)])
        else:
            scales = np.atleast_2d(scales)[:, picked]
        if isinstance(self.encoder, W4A8):
            scales = self.encoder.steps(scales)
        codes = codes if columns is None else codes[:, columns]
        put(self.codes[index], np.ascontiguousarray(codes).view(np.int8 if self.kind == INT8 else np.uint8))
        put(self.scales[index], np.ascontiguousarray(scales))

    def dense(self, index: int) -> paddle.Tensor:
        """See StoredCodes."""
        made = unpack(self.codes[index], self.scales[index], num_in=self.shape[1], kind=self.kind)
        return made.astype(self.dtype)

    def product(self, x_TD: paddle.Tensor, counts: list[int], *, bf16: bool) -> paddle.Tensor:
        """See StoredCodes."""
        return packed_product(x_TD, self.codes, self.scales, counts=counts, kind=self.kind, bf16=bf16)

    def num_bytes(self) -> int:
        """See StoredCodes."""
        return sum(int(x.size) * x.element_size() for x in (self.codes, self.scales))


class ConvolutionalCodes(KernelCodes):
    """wint2 and wint2.5, as ops/packed.py reads them."""

    def __init__(self, encoder: Wint2 | Wint25, shape: tuple[int, int, int], *, dtype: str) -> None:
        self.shape, self.dtype, self.convolution = shape, dtype, encoder
        count, num_in, num_out = shape
        self.kind = WINT2 if isinstance(encoder, Wint2) else WINT25
        rows, groups = encoder.packed_rows(num_in)
        self.codes = paddle.empty([count, rows, num_out], "uint8")
        self.scales = paddle.empty([count, groups, num_out], "float32")

    def take(self, index: int, arrays: Mapping[str, np.ndarray], columns: np.ndarray | None) -> None:
        """See StoredCodes."""
        picked = slice(None) if columns is None else columns
        fields = self.convolution.fields(*self.shape[1:])
        codes, scales = self.convolution.packed({name: arrays[name][..., picked] for name in fields})
        put(self.codes[index], codes)
        put(self.scales[index], scales)


def store_of(encoder: Encoder, shape: tuple[int, int, int], *, dtype: str) -> StoredCodes:
    """An empty store for weights of an encoder."""
    if isinstance(encoder, (Wint2, Wint25)):
        return ConvolutionalCodes(encoder, shape, dtype=dtype)
    return KernelCodes(encoder, shape, dtype=dtype)
