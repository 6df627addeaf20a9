"""Activations by scales that were fixed beforehand: rows that enter a product, and keys and values in a cache.

A scale is the step between codes: a calibration's largest number over the format's. What is beyond it is cut.
Shapes: T rows sorted by expert, E experts, B rows, S new tokens, T columns of a cache, K key heads, d head_dim.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import paddle

from erniekit.ops.float8 import Rows, Tensor, dense, quantise, rounded
from erniekit.ops.straight_through import per_row
from erniekit.precision.encoders import BLOCK
from erniekit.precision.packed import Rounding

_LARGEST = 127.0  # of int8, without -128


def int8_steps(largest: np.ndarray) -> np.ndarray:
    """The steps that let these numbers fit; where all were zero, the smallest that can be divided by."""
    return np.maximum(largest.astype(np.float32) / np.float32(_LARGEST), np.finfo(np.float32).tiny)


class FixedRounding:
    """Rows as int8 or E4M3 numbers times a step, one for each weight that they meet: what a product of 8-bit operands
    sees, as fp32 sums of such products are exact in the same places."""

    def __init__(self, steps_E: np.ndarray, kind: Literal["int8", "e4m3"], *, name: str) -> None:
        self.steps_E, self.kind, self.name = paddle.to_tensor(steps_E.astype(np.float32)), kind, name

    def __call__(self, x_TD: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """Rows sorted by weight, `counts` for each."""
        if not x_TD.size:
            return x_TD
        steps_T1 = per_row(self.steps_E, counts)
        scaled_TD = x_TD.astype("float32") / steps_T1
        if self.kind == "int8":
            whole_TD = _whole(scaled_TD)
        else:
            whole_TD = dense(quantise(scaled_TD, Tensor(), scale=paddle.ones([1]), name=f"what enters {self.name}"))
        return (whole_TD * steps_T1).astype(x_TD.dtype)


def rounding_by_rows(name: str) -> Rounding:
    """E4M3 with a power of two for every 128 inputs of a row, made when the row comes: for weights in blocks."""
    return lambda x_TD, _counts: rounded(x_TD, Rows(BLOCK), name=f"what enters {name}") if x_TD.size else x_TD


def _whole(scaled: paddle.Tensor) -> paddle.Tensor:
    """To the nearest integer, to even from the middle, within the format."""
    return paddle.round(scaled).clip(-_LARGEST, _LARGEST)


class Int8Cache:
    """Keys, or values, of a layer as int8 with a step for each channel (models/cache.py: Form)."""

    def __init__(self, steps_Kd: np.ndarray, *, dtype: str) -> None:
        self.steps_Kd, self.dtype = paddle.to_tensor(steps_Kd.astype(np.float32)), dtype

    def encode(self, x_BSKd: paddle.Tensor) -> paddle.Tensor:
        """As they are held."""
        return _whole(x_BSKd.astype("float32") / self.steps_Kd).astype("int8")

    def decode(self, held_BKTd: paddle.Tensor) -> paddle.Tensor:
        """As attention reads them."""
        return (held_BKTd.astype("float32") * self.steps_Kd.unsqueeze(1)).astype(self.dtype)

    def rounded(self, x_BSKd: paddle.Tensor) -> paddle.Tensor:
        """Encoded and decoded."""
        return (_whole(x_BSKd.astype("float32") / self.steps_Kd) * self.steps_Kd).astype(self.dtype)
