"""The memory that a run has taken at most, to stand beside its budget.

On a CPU the figure is Paddle's own account of tensors, byte for byte; beside it stands what the process held in memory,
which is more: kernels and numpy have buffers of their own, and malloc keeps what was freed for the next step (that is
faster, base/runtime.py). On a GPU (never run) the figure is Paddle's account of the device.
"""

from __future__ import annotations

import paddle
from paddle.base import core

from erniekit.base import resources

_TENSORS, _DEVICE = "Allocated", 0


class MemoryWatch:
    """Watches from the moment that it is made; what was there before does not count."""

    def __init__(self) -> None:
        self.on_gpu = paddle.device.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")
        if self.on_gpu:
            paddle.device.cuda.reset_max_memory_allocated()
            self._tensors_before = paddle.device.cuda.memory_allocated()
        else:
            core.host_memory_stat_reset_peak_value(_TENSORS, _DEVICE)
            self._tensors_before = core.host_memory_stat_current_value(_TENSORS, _DEVICE)
        resources.forget_peak()
        self._process_before = resources.resident()

    @property
    def tensors(self) -> int:
        """The most bytes of tensors at once."""
        if self.on_gpu:
            return paddle.device.cuda.max_memory_allocated() - self._tensors_before
        return core.host_memory_stat_peak_value(_TENSORS, _DEVICE) - self._tensors_before

    @property
    def process(self) -> int:
        """The most bytes that the process held in memory; 0 where the system does not tell."""
        return max(resources.peak_resident() - self._process_before, 0)
