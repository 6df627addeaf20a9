"""From fp32 weights to codes and scales, in numpy. How they lie: ops/arrays/packed.py.

int8 and int4 are symmetric: scale = largest / 127 or / 7, code = nearest integer (half to even), so no number is off by
more than half a scale. nf4 scales a group to [-1, 1] and takes the nearest of 16 quantiles of the normal distribution.
Scales are fp32; those of QLoRA's second quantisation are not made. Knows arrays, no model and no file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from erniekit.base.errors import CheckpointError
from erniekit.config.packing import Kind
from erniekit.ops.arrays.packed import INT4, INT8, NF4, NORMAL_FLOAT, unpack
from erniekit.ops.arrays.threads import spread

KERNEL_KINDS: dict[Kind, int] = {"int8": INT8, "int4": INT4, "nf4": NF4}
Greatest = Callable[[np.ndarray], np.ndarray]
_LARGEST: dict[Kind, int] = {"int8": 127, "int4": 7, "nf4": 1}
_MIDDLES = (NORMAL_FLOAT[1:] + NORMAL_FLOAT[:-1]) / 2
_LEAST_SCALE = np.finfo(np.float32).tiny  # of groups of zeros: nothing is divided by zero, and zeros stay zeros
_BLOCK = 1 << 17  # numbers that a thread works on at a time: what it makes beside them stays small


def code_rows(kind: Kind, num_in: int) -> int:
    """Rows of codes of a weight [num_in, ...]."""
    return num_in if kind == "int8" else -(-num_in // 2)


def require_finite(numbers: np.ndarray, *, name: str) -> None:
    """Raise CheckpointError naming the weight unless all numbers are finite."""
    if not np.isfinite(numbers).all():
        raise CheckpointError(
            f"{name} holds NaN or infinity, which has no quantised form. The folder is damaged: download it again, "
            "or take the last sound checkpoint."
        )


def pack(
    weight: np.ndarray, kind: Kind, group_size: int | None, *, name: str, greatest: Greatest | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of a weight [in, out] whose inputs are a multiple of the group size (None: all inputs).

    Where these are some of the inputs only and all share a scale, `greatest` finds the largest numbers [1, out] of all.
    Raises CheckpointError naming the weight if it holds NaN or infinity.
    """
    num_in, num_out = weight.shape
    codes = np.empty([code_rows(kind, num_in), num_out], np.int8 if kind == "int8" else np.uint8)
    scales = np.empty([num_in // (group_size or num_in), num_out], np.float32)
    step = max(_BLOCK // num_in, 1)
    largest = None if greatest is None or group_size else greatest(np.abs(weight).max(0, keepdims=True))

    def work(block: int) -> None:
        part = slice(block * step, (block + 1) * step)
        known = None if largest is None else largest[:, part]
        _pack(weight[:, part], kind, codes[:, part], scales[:, part], known)

    spread(-(-num_out // step), work)
    require_finite(scales, name=name)  # NaN and infinity are the largest of their group
    return codes, scales


def _pack(
    weight: np.ndarray, kind: Kind, codes: np.ndarray, scales: np.ndarray, largest: np.ndarray | None
) -> None:
    groups, width = scales.shape
    scaled = weight.reshape(groups, -1, width)
    largest = np.abs(scaled).max(1) if largest is None else largest
    np.maximum(largest / np.float32(_LARGEST[kind]), _LEAST_SCALE, out=scales)
    scaled = (scaled / scales[:, None]).reshape(weight.shape)
    if kind == "int8":
        codes[:] = np.rint(scaled, out=scaled)
        return
    places = np.searchsorted(_MIDDLES, scaled) if kind == "nf4" else np.rint(scaled, out=scaled) + np.float32(8)
    places = places.astype(np.uint8)
    codes[:] = places[::2]
    codes[: len(weight) // 2] |= places[1::2] << 4


def dense(codes: np.ndarray, scales: np.ndarray, kind: Kind, num_in: int) -> np.ndarray:
    """The fp32 weight [in, out] that codes and scales stand for."""
    out = np.empty([num_in, codes.shape[1]], np.float32)
    unpack(codes, scales, out, num_in, codes.shape[1], len(scales), KERNEL_KINDS[kind])
    return out
