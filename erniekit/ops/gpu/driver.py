"""Launching Triton's kernels from Paddle. Knows no kernels.

Triton asks its active driver for the device and the stream to launch on, and its own driver asks torch; without torch
(Triton 3.9) it takes the default stream, which is not the one Paddle computes on, so a kernel could read what is not
written yet. So Paddle's device and stream are put in its place for the time of a launch, and what was there comes back
after it: torch in the same process keeps its own. Tensors need nothing: Triton takes whatever has data_ptr() and a
dtype whose name it knows, as Paddle's have. `paddle.enable_compat(scope={"triton"})` aims at the same by letting Triton
import Paddle under the name of torch; that depends on when which of them is imported, and this does not.
Not run on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import paddle
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver


class PaddleDriver(CudaDriver):
    """Triton's driver for NVIDIA GPUs, which asks Paddle where torch would be asked."""

    def __init__(self) -> None:
        # Not the parent's: that would look for torch.
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.get_current_device = _device
        self.set_current_device = _set_device
        self.get_device_capability = _capability
        self.get_current_stream = _stream


def _device() -> int:
    return int(paddle.device.get_device().partition(":")[2] or 0)


def _set_device(index: int) -> None:
    paddle.device.set_device(f"gpu:{index}")


def _capability(index: int) -> tuple[int, int]:
    return paddle.device.cuda.get_device_capability(index)


def _stream(index: int) -> int:
    return paddle.device.current_stream(f"gpu:{index}").stream_base.cuda_stream


@functools.cache
def _driver() -> PaddleDriver:
    return PaddleDriver()


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Launch Triton's kernels in here: they go to Paddle's current device and stream."""
    if not paddle.get_device().startswith("gpu"):
        yield  # the interpreter, which needs no driver
        return
    before = driver._active  # the property would look for torch's
    driver.set_active(_driver())
    try:
        yield
    finally:
        driver.set_active(before)
