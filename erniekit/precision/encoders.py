"""Formats of a stored weight: from fp32 [in, out] to named arrays and back, in numpy.

An encoder knows one weight at a time: no model, no file and no other format. Its arrays have shapes that sizes alone
tell, so that a file can be laid out before anything is encoded. Convolutional codes of 2 and 2.5 bits: ccq.py.

    weight       arrays                                        the weight again
    Integers     quant_weight, weight_scale [groups, out]      code * scale
    W4A8         quant_weight, weight_scale [out]              code * (scale / 7): the scale is the largest number, as
                                                               the published folders' reader takes it
    Float8       quant_weight, weight_scale [1]                E4M3(code) * scale
    Float8Qat    quant_weight, weight_scale [1]                E4M3(code) * scale, turned back (qat.py)
    Float8Blocks quant_weight, weight_scale [in/128, out/128]  E4M3(code) * scale, a power of two
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np

from erniekit.ops.arrays import float8
from erniekit.ops.arrays.float8 import ADDED, E4M3, block_amax, power_of_two, spread_scales
from erniekit.ops.arrays.hadamard import SIZE, rotated_inputs
from erniekit.ops.arrays.threads import spread
from erniekit.precision.quantize import code_rows, dense, pack, require_finite

WEIGHT, SCALE, ACTIVATION_SCALE = "quant_weight", "weight_scale", "activation_scale"
BLOCK = 128
_LEAST = np.finfo(np.float32).tiny  # the scale of zeros: nothing is divided by zero, and zeros stay zeros


class Field(NamedTuple):
    """An array of an encoded weight."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Encoder(Protocol):
    """One format."""

    @property
    def multiple(self) -> int:
        """The inputs of a weight come in multiples of this."""

    def fields(self, num_in: int, num_out: int) -> dict[str, Field]:
        """What `encode` makes of a weight [in, out], by name."""

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of an fp32 weight. `hessian_diag` [in], the mean square of each input, says which errors count
        most; formats without a choice ignore it. Raises CheckpointError with the weight's `name` if it holds NaN or
        infinity."""

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """The fp32 weight [in, out] that the arrays stand for."""


class Integers:
    """int8 or int4 codes, symmetric, with a scale for each output or each `group_size` inputs of it."""

    def __init__(self, kind: Literal["int8", "int4"], group_size: int | None = None) -> None:
        self.kind, self.group_size = kind, group_size

    @property
    def multiple(self) -> int:
        """See Encoder."""
        return self.group_size or 1

    def fields(self, num_in: int, num_out: int) -> dict[str, Field]:
        """See Encoder."""
        code = np.dtype(np.int8 if self.kind == "int8" else np.uint8)
        groups = num_in // (self.group_size or num_in)
        return {
            WEIGHT: Field(code, (code_rows(self.kind, num_in), num_out)),
            SCALE: Field(np.dtype(np.float32), (groups, num_out) if self.group_size else (num_out,)),
        }

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None  # noqa: ARG002 - no choice
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """See Encoder."""
        codes, scales = pack(weight_DF, self.kind, self.group_size, name=name)
        return {WEIGHT: codes, SCALE: scales if self.group_size else scales[0]}

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        scales = arrays[SCALE]
        return dense(arrays[WEIGHT], np.atleast_2d(scales), self.kind, num_in)


class W4A8(Integers):
    """int4 codes for products with int8 activations; the scale is the largest number of an output."""

    def __init__(self) -> None:
        super().__init__("int4")

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None  # noqa: ARG002 - no choice
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """See Encoder."""
        return super().encode(weight_DF, name=name) | {SCALE: np.abs(weight_DF).max(0)}

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        return super().decode({**arrays, SCALE: self.steps(arrays[SCALE])}, num_in=num_in)

    def steps(self, largest: np.ndarray) -> np.ndarray:
        """What a code of 1 stands for."""
        return np.maximum(largest / np.float32(7), _LEAST)


class Float8:
    """E4M3 codes (as int8: their bits) with one scale for the weight, so that its largest number is E4M3's."""

    @property
    def multiple(self) -> int:
        """See Encoder."""
        return 1

    def fields(self, num_in: int, num_out: int) -> dict[str, Field]:
        """See Encoder."""
        return {WEIGHT: Field(np.dtype(np.int8), (num_in, num_out)), SCALE: Field(np.dtype(np.float32), (1,))}

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None  # noqa: ARG002 - no choice
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """See Encoder."""
        largest = block_amax(weight_DF, weight_DF.shape)
        require_finite(largest, name=name)
        scale = np.maximum(largest / np.float32(E4M3.largest), _LEAST)
        return {WEIGHT: _codes(weight_DF, scale, weight_DF.shape), SCALE: scale.reshape(1)}

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        assert len(arrays[WEIGHT]) == num_in
        return float8.decode(arrays[WEIGHT], E4M3) * arrays[SCALE]


class Float8Qat(Float8):
    """The codes with which quantisation-aware training computed (qat.py), bit for bit. Rotated ones meet rotated
    inputs; the 32 of both rotations is in the scale."""

    def __init__(self, *, rotated: bool) -> None:
        self.rotated = rotated

    @property
    def multiple(self) -> int:
        """See Encoder."""
        return SIZE if self.rotated else 1

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None  # noqa: ARG002 - no choice
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """See Encoder."""
        require_finite(weight_DF, name=name)
        turned = rotated_inputs(weight_DF) if self.rotated else weight_DF
        scale = block_amax(turned, turned.shape) / np.float32(E4M3.largest) + np.float32(ADDED)
        share = np.float32(SIZE if self.rotated else 1)
        return {WEIGHT: _codes(turned, scale, turned.shape), SCALE: (scale / share).reshape(1)}

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        made = super().decode(arrays, num_in=num_in)
        return rotated_inputs(made) if self.rotated else made


class Float8Blocks:
    """E4M3 codes with a power of two for every 128 x 128 of them: the smallest that lets the largest fit."""

    multiple = BLOCK

    def fields(self, num_in: int, num_out: int) -> dict[str, Field]:
        """See Encoder."""
        blocks = (num_in // BLOCK, -(-num_out // BLOCK))
        return {WEIGHT: Field(np.dtype(np.int8), (num_in, num_out)), SCALE: Field(np.dtype(np.float32), blocks)}

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None  # noqa: ARG002 - no choice
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """See Encoder."""
        largest = block_amax(weight_DF, (BLOCK, BLOCK))
        require_finite(largest, name=name)
        scales = power_of_two(largest, E4M3)
        return {WEIGHT: _codes(weight_DF, scales, (BLOCK, BLOCK)), SCALE: scales}

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        assert len(arrays[WEIGHT]) == num_in
        return float8.dense(arrays[WEIGHT], arrays[SCALE], float8.Blocks(BLOCK, BLOCK), kind=E4M3)


def _codes(weight: np.ndarray, scales: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """E4M3 of weight / scale. Every thread takes whole blocks."""
    codes, (height, width) = np.empty(weight.shape, np.int8), block
    step = min(height, BLOCK)

    def work(part: int) -> None:
        rows = slice(part * step, min((part + 1) * step, len(weight)))
        spread_over = spread_scales(scales[rows.start // height :][:1], (step, weight.shape[1]), (step, width))
        codes[rows] = float8.encode(weight[rows] / spread_over[: rows.stop - rows.start], E4M3).view(np.int8)

    spread(-(-len(weight) // step), work)
    return codes
