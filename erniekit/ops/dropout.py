"""Dropout with a stream of random numbers of one's own, where several devices work on parts of one tensor.

Devices draw alike from Paddle's global generator, so that what all of them compute stays alike. On a part of a tensor
each must drop other numbers: it draws one number as all do, and goes on from there by itself. Shapes: any.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

_LARGEST_SEED = 2**31 - 2**16  # leaves room for a number of its own for every block of attention
_APART = 1_000_003


def drawn_seed(stream: int) -> int:
    """A seed from the global generator, another one for every stream; all streams draw one number."""
    drawn = int(paddle.randint(1, _LARGEST_SEED, [1]).item())
    return (drawn + stream * _APART - 1) % (_LARGEST_SEED - 1) + 1


def dropout(x: paddle.Tensor, probability: float, *, stream: int = 0) -> paddle.Tensor:
    """x with numbers dropped and the others scaled up; stream 0 is the global generator itself."""
    if not stream:
        return F.dropout(x, probability)
    seed = drawn_seed(stream)
    if not x.size:
        return x
    kept = paddle.uniform(x.shape, "float32", 0.0, 1.0, seed=seed) >= probability
    return x * (kept.astype("float32") / (1.0 - probability)).astype(x.dtype)
