"""Rounding fp32 to bf16 with a dither, for averages that are stored in bf16 and move by little at a time.

bf16 has 8 significant bits: to the nearest, a change below about 0.3 % is rounded away, and a second moment with beta2
0.999 (0.1 % a step) would never come down again. Here what is rounded away counts: of every 65536 steps, a number that
lies a share f of the way to the next bf16 is rounded up in f. The threshold depends on the element and the step alone,
so that a run that was cut continues bit-equal. Thresholds of consecutive steps are spread by the golden ratio
(an additive recurrence), which makes the error of a sum over steps far smaller than with random thresholds.
"""

from __future__ import annotations

import paddle

LEVELS = 65536  # the bits of fp32 that bf16 does not have; the kernel in csrc/optimizer.cpp does the same arithmetic
BY_ELEMENT, BY_STEP = 46349, 40503  # odd, so that every threshold occurs


def dithered_bf16(x: paddle.Tensor, *, step: int, start: int = 0) -> paddle.Tensor:
    """An fp32 tensor in bf16, rounded up or down so that it is right on average over steps. NaN and inf stay. The
    tensor may be a range of a larger one, from its number `start` on."""
    first = (step * BY_STEP + start * BY_ELEMENT) % LEVELS
    dither = (paddle.arange(x.size, dtype="int32") * BY_ELEMENT + first) % LEVELS
    bits = x.contiguous().view("int32") + dither.reshape(x.shape)
    rounded = (bits - bits % LEVELS).view("float32")
    return paddle.where(paddle.isfinite(x), rounded, x).astype("bfloat16")
