"""The AdamW update on its kernel (csrc/optimizer.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import paddle

from erniekit.ops.cpu.library import call
from erniekit.ops.rounding import BY_ELEMENT, BY_STEP, LEVELS

if TYPE_CHECKING:
    from erniekit.ops.adamw import Update


def adamw(
    p: paddle.Tensor, grad: paddle.Tensor, *, first: paddle.Tensor, second: paddle.Tensor, update: Update,
    weight_decay: float, start: int = 0,
) -> None:  # fmt: skip
    """Move an fp32 parameter, or its numbers from `start` on, and its moments (both fp32 or bf16) by one step."""
    rate = update.learning_rate / (1.0 - update.beta1**update.num_steps)
    root = (1.0 - update.beta2**update.num_steps) ** -0.5
    shrink = 1.0 - update.learning_rate * weight_decay
    numbers = (update.gradient_scale, update.beta1, update.beta2, update.epsilon, rate, root, shrink)
    if first.dtype == paddle.float32:
        call("adamw", p, grad.contiguous(), first, second, p.size, *numbers)
    else:
        dither = ((update.num_steps * BY_STEP + start * BY_ELEMENT) % LEVELS, BY_ELEMENT)
        call("adamw_bf16", p, grad.contiguous(), first, second, p.size, *dither, *numbers)
