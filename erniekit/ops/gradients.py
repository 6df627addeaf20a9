"""What every PyLayer does about inputs that want no gradient: Paddle insists on None for them."""

from __future__ import annotations

from collections.abc import Sequence

import paddle


def wanted(*tensors: paddle.Tensor | None) -> list[bool]:
    """Which inputs of a forward pass want a gradient."""
    return [x is not None and not x.stop_gradient for x in tensors]


def only(wanted: Sequence[bool], grads: Sequence[paddle.Tensor | None]) -> tuple[paddle.Tensor | None, ...]:
    """`grads` with None where nobody wants one."""
    return tuple(grad if want else None for want, grad in zip(wanted, grads, strict=True))
