"""The one rule that picks a kernel: fp32 tensors on a CPU take the fast CPU kernels, tensors on a GPU take Paddle's
fused operators, everything else (and ERNIEKIT_PLAIN_OPS=1) takes the plain twin."""

from __future__ import annotations

from typing import Literal

import paddle

from erniekit.base import runtime

Backend = Literal["cpu", "gpu", "plain"]


def backend(x: paddle.Tensor) -> Backend:
    """Which implementation serves a tensor like `x`."""
    if runtime.plain_ops():
        return "plain"
    if x.place.is_gpu_place():
        return "gpu"
    return "cpu" if x.place.is_cpu_place() and x.dtype == paddle.float32 else "plain"
