"""The one rule that picks a kernel: fp32 tensors on a CPU take the fast CPU kernels (compiled, or else in numpy),
tensors on a GPU take Paddle's fused operators, everything else (and ERNIEKIT_PLAIN_OPS=1) takes the plain twin.

Paddle has no fused operators for routed experts in bf16 that fit ours, so on a GPU they take the plain twin, or, with
ERNIEKIT_TRITON=1, Triton's kernels. Those are asked for, not chosen by themselves, as long as none has run on a GPU."""

from __future__ import annotations

import importlib.util
from typing import Literal

import paddle

from erniekit.base import runtime

Backend = Literal["cpu", "gpu", "plain"]
ExpertBackend = Literal["cpu", "triton", "plain"]
_CPU_TYPES = (paddle.float32, paddle.int64)  # numbers and indices of the CPU kernels
_TRITON_TYPES = (paddle.bfloat16, paddle.int64)


def backend(*tensors: paddle.Tensor) -> Backend:
    """Which implementation serves these tensors."""
    if runtime.plain_ops():
        return "plain"
    if all(x.place.is_gpu_place() for x in tensors):
        return "gpu"
    fast = all(x.place.is_cpu_place() and x.dtype in _CPU_TYPES for x in tensors)
    return "cpu" if fast else "plain"


def expert_backend(*tensors: paddle.Tensor) -> ExpertBackend:
    """Which implementation serves routed experts with these tensors: Triton's takes bf16 numbers on Hopper or later."""
    chosen = backend(*tensors)
    if chosen != "gpu":
        return chosen
    fits = all(x.dtype in _TRITON_TYPES for x in tensors) and paddle.device.cuda.get_device_capability() >= (9, 0)
    return "triton" if runtime.triton_ops() and fits and importlib.util.find_spec("triton") else "plain"
