"""The AdamW update of one parameter in place (arXiv 1711.05101), with the scale of gradient clipping folded in.

Moments are fp32 or both bf16; bf16 ones are rounded with a dither (ops/rounding.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from erniekit.ops.cpu import optimizer as cpu
from erniekit.ops.dispatch import backend
from erniekit.ops.rounding import dithered_bf16

_THREAD_ROWS = 1000  # Paddle's default: how many numbers a thread of its kernel takes at once
_SHARED_POWERS = True  # Paddle's kernel reads beta^t and leaves it alone: it is a function of the step here


@dataclass(frozen=True)
class Update:
    """How one parameter moves in a step; `num_steps` counts from 1, gradients count `gradient_scale` times."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    num_steps: int
    gradient_scale: float = 1.0


def adamw_plain(
    p: paddle.Tensor, grad: paddle.Tensor, *, first: paddle.Tensor, second: paddle.Tensor,
    master: paddle.Tensor | None, update: Update, weight_decay: float, start: int = 0,
) -> None:  # fmt: skip
    """The plain twin of `adamw`: Paddle's fused kernel. It scales `grad` in place."""
    if update.gradient_scale != 1.0:
        grad.scale_(update.gradient_scale)
    small = first.dtype == paddle.bfloat16
    moments = [x.astype("float32") if small else x for x in (first, second)]
    rate = paddle.full([1], update.learning_rate, "float32")
    powers = [paddle.full([1], beta**update.num_steps, "float32") for beta in (update.beta1, update.beta2)]
    paddle._C_ops.adamw_(
        p, grad, rate, *moments, None, *powers, master, None, update.beta1, update.beta2, update.epsilon, 1.0,
        weight_decay, weight_decay != 0.0, False, _THREAD_ROWS, master is not None, _SHARED_POWERS, False,
    )  # fmt: skip
    if small:
        for stored, moment in zip((first, second), moments, strict=True):
            paddle.assign(dithered_bf16(moment, step=update.num_steps, start=start), stored)


def adamw(
    p: paddle.Tensor, grad: paddle.Tensor, *, first: paddle.Tensor, second: paddle.Tensor,
    master: paddle.Tensor | None, update: Update, weight_decay: float, start: int = 0,
) -> None:  # fmt: skip
    """Move `p` (and its fp32 `master`, if it has one) and its moments by one step. The gradient is used up.

    `p` may be a range of a parameter that begins at its number `start`: bf16 moments are rounded as in the whole one.
    """
    if master is None and backend(p, grad) == "cpu":
        cpu.adamw(p, grad, first=first, second=second, update=update, weight_decay=weight_decay, start=start)
    else:
        adamw_plain(
            p, grad, first=first, second=second, master=master, update=update, weight_decay=weight_decay, start=start
        )  # fmt: skip
