"""What FP8 runs are compared with: the same runs without any rounding, and runs that start one bit away.

The first show what two layouts differ by apart from rounding. The second show how far rounding alone drives two runs
apart that are equal: a number that lies between two codes falls on the other side, 6 % away.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from erniekit.ops import float8
from erniekit.ops.float8 import E4M3, Float8, Rows, quantise
from erniekit.precision import blockwise
from erniekit.precision.watch import Watch
from erniekit.training import assemble

_ONE = {"float8_e4m3fn": 0x38, "float8_e5m2": 0x3C}  # the codes of 1


def casts_off(patch: pytest.MonkeyPatch) -> None:
    """Codes become fp32 numbers: divided by their scales as ever, and neither clamped nor rounded. All else is what
    runs do with codes: scales, copies of weights, rows that travel, products (by the plain twins of kernels)."""
    patch.setenv("ERNIEKIT_PLAIN_OPS", "1")
    patch.setattr(float8, "quantise", _divided)  # of which quantise_or_nan, that modules call, is made
    for module in (blockwise, float8):
        patch.setattr(module, "bf16_numbers", lambda x: x)
    patch.setattr(blockwise, "_rows", _rows)
    patch.setattr(blockwise._Wire, "encode", lambda _wire, x_TD: _bytes(x_TD.astype("float32")))
    patch.setattr(blockwise._Wire, "decode", lambda _wire, bytes_TB: _numbers(bytes_TB))
    patch.setattr(Watch, "saw", lambda *_args, **_how: None)  # knows no such codes


def _divided(x: paddle.Tensor, *args: Any, **how: Any) -> Float8:
    made = quantise(x, *args, **how)
    ones = replace(made, codes=paddle.full_like(made.codes, _ONE[made.kind.name]))
    codes = x.astype("float32") / float8.dense_plain(ones) if x.size else made.codes.astype("float32")
    return replace(made, codes=codes, kind=made.kind._replace(name="float32"))


def _rows(codes: paddle.Tensor, scales: paddle.Tensor) -> paddle.Tensor:
    return float8.dense_plain(Float8(codes, scales, Rows(), E4M3._replace(name="float32"), [codes.shape[0]]))


def _bytes(x_TD: paddle.Tensor) -> paddle.Tensor:
    return x_TD.contiguous().clone().view("uint8") if x_TD.size else paddle.zeros([0, 4 * x_TD.shape[1]], "uint8")


def _numbers(bytes_TB: paddle.Tensor) -> paddle.Tensor:
    if not bytes_TB.size:
        return paddle.zeros([0, bytes_TB.shape[1] // 4])
    return bytes_TB.contiguous().clone().view("float32")


def nudged(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Every weight starts as one of the two fp32 numbers beside it."""
    place = assemble.assemble_fp8

    def assembled(model: nn.Layer, *args: Any, **how: Any) -> Any:
        rng = np.random.default_rng(seed)
        for weight in model.parameters():
            numbers = weight.numpy()
            sides = np.where(rng.random(numbers.shape) < 0.5, -np.inf, np.inf).astype("float32")
            weight.set_value(np.nextafter(numbers, sides))
        return place(model, *args, **how)

    patch.setattr(assemble, "assemble_fp8", assembled)
