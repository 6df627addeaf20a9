"""Optimizer states in host memory: they come to the device for the update of their parameter and go back after it, so
that a device holds those of one parameter at a time.

On a CPU host memory is the device's own: nothing is copied, and a run is the same. On a GPU host memory is pinned,
which it reads without a copy on the way; that was not run. Knows where tensors are, not what they mean.
"""

from __future__ import annotations

import paddle


def to_host(tensor: paddle.Tensor) -> paddle.Tensor:
    """The tensor in host memory; itself if it is there."""
    return tensor if tensor.place.is_cpu_place() or tensor.place.is_cuda_pinned_place() else tensor.pin_memory()


def to_device(tensor: paddle.Tensor, beside: paddle.Tensor) -> paddle.Tensor:
    """The tensor in the memory of `beside`; itself if it is not in host memory, or if both are."""
    return tensor.to(beside.place) if tensor.place.is_cuda_pinned_place() else tensor
