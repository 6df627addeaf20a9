"""FP8 numbers in numpy: formats, scales, and how a matrix is cut into blocks that share a scale. Knows no Paddle.

E4M3 has 4 bits of exponent and 3 of mantissa, and no infinity; E5M2 has 5 and 2. A block's scale is the smallest power
of two that brings its largest number within the format, so that scaling is exact and only the cast rounds. It is what
Paddle's kernels make with `using_pow2_scale`. Blocks of zeros have scale 1; no scale is a subnormal number.
Shapes: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Kind(NamedTuple):
    """A format of 8 bits."""

    name: str  # as Paddle and safetensors call it
    number: int  # as csrc/float8.cpp calls it
    top: int  # the largest finite number is 1.75 * 2^top

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return 1.75 * 2.0**self.top

    @property
    def dtype(self) -> np.dtype:
        """As ml_dtypes has it."""
        return np.dtype(getattr(ml_dtypes, self.name))


E4M3, E5M2 = Kind("float8_e4m3fn", 0, 8), Kind("float8_e5m2", 1, 15)
ADDED = 1e-8  # to the scales of quantisation-aware training, as published: a tensor of zeros has one, too
THREE_QUARTERS, MANTISSA, BIAS = 0x600000, 1 << 23, 127  # of fp32


@dataclass(frozen=True)
class Rows:
    """A scale for `size` neighbours in a row: activations and gradients."""

    size: int = 128

    def block(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002 - the same for every scheme
        """Rows and columns of a block of a matrix."""
        return 1, self.size


@dataclass(frozen=True)
class Columns:
    """A scale for `size` neighbours in a column: rows are tokens, and a product sums over them."""

    size: int = 128

    def block(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002
        """See Rows."""
        return self.size, 1


@dataclass(frozen=True)
class Blocks:
    """A scale for a rectangle: weights."""

    rows: int = 128
    columns: int = 128

    def block(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002
        """See Rows."""
        return self.rows, self.columns


@dataclass(frozen=True)
class Tensor:
    """One scale for a whole matrix."""

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """See Rows."""
        return max(rows, 1), max(columns, 1)


Scheme = Rows | Columns | Blocks | Tensor


def encode(x: np.ndarray, kind: Kind) -> np.ndarray:
    """Codes (uint8) of finite numbers: clamped to the format, then to the nearest, to even from the middle."""
    return np.clip(x, -kind.largest, kind.largest).astype(kind.dtype).view(np.uint8)


def decode(codes: np.ndarray, kind: Kind) -> np.ndarray:
    """The fp32 numbers that codes stand for."""
    return codes.view(kind.dtype).astype(np.float32)


def power_of_two(amax: np.ndarray, kind: Kind) -> np.ndarray:
    """The scale of blocks whose largest magnitude is `amax` (fp32, finite)."""
    bits = np.ascontiguousarray(amax, np.float32).view(np.int32)
    exponent = bits // MANTISSA - BIAS - kind.top + (bits % MANTISSA > THREE_QUARTERS)
    scale = (np.maximum(exponent, 1 - BIAS) + BIAS).astype(np.int32) * np.int32(MANTISSA)
    return np.where(bits == 0, np.float32(1.0), scale.view(np.float32)).reshape(np.shape(amax))


def spread_scales(scales: np.ndarray, shape: Sequence[int], block: tuple[int, int]) -> np.ndarray:
    """The scale of every number of a matrix [R, C]."""
    return scales.repeat(block[0], 0)[: shape[0]].repeat(block[1], 1)[:, : shape[1]]


def block_amax(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The largest magnitude of every block of a matrix [R, C]; the last ones may be short."""
    starts = [np.arange(0, size, step) for size, step in zip(x.shape, block, strict=True)]
    return np.maximum.reduceat(np.maximum.reduceat(np.abs(x), starts[0], 0), starts[1], 1)


def quantised(x: np.ndarray, scheme: Scheme, *, kind: Kind = E4M3) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of a finite fp32 matrix [R, C], with powers of two for scales."""
    block = scheme.block(*x.shape)
    scales = power_of_two(block_amax(x, block), kind)
    return encode(x / spread_scales(scales, x.shape, block), kind), scales


def dense(codes: np.ndarray, scales: np.ndarray, scheme: Scheme, *, kind: Kind = E4M3) -> np.ndarray:
    """The fp32 matrix that codes and scales stand for."""
    return decode(codes, kind) * spread_scales(scales, codes.shape, scheme.block(*codes.shape))
