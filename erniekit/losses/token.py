"""How per-token losses become one number: the global mean, and ERNIE's token-balanced form.

techniques.md section 3: the standard form divides by the trained tokens, the balanced form by all positions, so that
every trained token weighs the same whatever batch it falls into.
"""

from __future__ import annotations

import paddle


def mean_loss(loss_sum: paddle.Tensor, *, trained: int) -> paddle.Tensor:
    """Sum / number of trained tokens (of the whole global batch)."""
    return loss_sum / max(trained, 1)


def balanced_loss(loss_sum: paddle.Tensor, *, trained: int, positions: int) -> paddle.Tensor:
    """The gradient of loss_sum / positions with the value of loss_sum / trained."""
    balanced = loss_sum / max(positions, 1)
    return balanced - balanced.detach() + mean_loss(loss_sum, trained=trained).detach()


def gradient_only(loss: paddle.Tensor) -> paddle.Tensor:
    """A term with the gradient of `loss` and the value 0 (auxiliary losses that the reported loss never contains)."""
    return loss - loss.detach()
