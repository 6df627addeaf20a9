"""Tensors cut out of larger ones: a kernel that takes another tensor's stride, or writes past an edge, shows. Each
tensor of a test has a gap of its own behind its rows, wider than a tile reaches."""

from __future__ import annotations

import numpy as np
import paddle

_BELOW = 128  # rows: as many as a tile has


class Frame:
    """Room for a result, a matrix or a stack of them, and what lies around it: to the right of its rows, and below them
    or behind the last matrix. What is not written is NaN, as a number and as a code."""

    def __init__(self, *shape: int, dtype: str, gap: int) -> None:
        behind = _BELOW if len(shape) == 2 else 1
        room = [shape[0] + behind, *shape[1:-1], shape[-1] + gap]
        self.whole = paddle.full(room, 0x7F if dtype == "uint8" else float("nan"), dtype)
        self.inner = self.whole[: shape[0], ..., : shape[-1]]
        assert self.inner.data_ptr() == self.whole.data_ptr(), "a view, not a copy"

    def numbers(self) -> np.ndarray:
        """What was written, if it was written inside and nowhere else."""
        (rows, *_, columns), whole = self.inner.shape, self.whole
        found = whole.numpy() if whole.dtype == paddle.uint8 else whole.astype("float32").numpy()
        for outside in (found[rows:], found[..., columns:]):
            assert (outside == 0x7F if whole.dtype == paddle.uint8 else np.isnan(outside)).all()
        return found[:rows, ..., :columns]


def cut_out(x: paddle.Tensor, *, gap: int) -> paddle.Tensor:
    """`x` as a view of a larger tensor, with other numbers around it."""
    frame = Frame(*x.shape, dtype=str(x.dtype).removeprefix("paddle."), gap=gap)
    frame.whole.fill_(100)
    frame.whole[: x.shape[0], ..., : x.shape[-1]] = x
    return frame.inner
