"""A moving average of the weights, in fp32, beside the optimizer: e <- e + (1 - c) (w - e).

It starts at the weights (the official toolkit's in-memory one starts at zero, which is wrong by c^t of the weight).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import paddle

from erniekit.parallel.zero import GradientSync
from erniekit.training.offload import to_device


class Averages:
    """The averages by parameter name, of what this rank updates. `decay` is what an update keeps; one is made every
    `interval` steps."""

    def __init__(self, sync: GradientSync, *, decay: float, interval: int = 1) -> None:
        self._sync, self._decay, self._interval = sync, decay, interval
        self.tensors = {name: _fp32_copy(sync.weight(name)) for name in sync.names}

    @paddle.no_grad()
    def update(self, masters: Mapping[str, paddle.Tensor], *, num_steps: int) -> None:
        """Follow the weights (their fp32 masters, where there are any) after step number `num_steps`."""
        if num_steps % self._interval:
            return
        for name, average in self.tensors.items():
            weight = masters.get(name)
            weight = self._sync.weight(name) if weight is None else to_device(weight, average)
            average.add_((weight - average) * (1.0 - self._decay))

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over saved averages."""
        for name, array in arrays.items():
            self.tensors[name] = paddle.to_tensor(np.asarray(array).reshape(self.tensors[name].shape))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages within, and its own weights again afterwards, bit for bit."""
        own = {name: self._sync.weight(name).clone() for name in self.tensors}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(own)

    @paddle.no_grad()
    def _put(self, tensors: Mapping[str, paddle.Tensor]) -> None:
        for name, tensor in tensors.items():
            weight = self._sync.weight(name)
            paddle.assign(tensor.astype(weight.dtype), weight)
        self._sync.gather_weights()


@paddle.no_grad()
def _fp32_copy(p: paddle.Tensor) -> paddle.Tensor:
    return p.clone() if p.dtype == paddle.float32 else p.astype("float32")
