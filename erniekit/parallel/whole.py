"""Between a rank's part of a parameter and the whole of it, by its name: for what is drawn, loaded or computed whole.

Who holds what is styles.py's; this file cuts arrays and puts them together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor

from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.styles import Style, held_ranges, slot_of


class Wholes:
    """The parameters of a model of architecture `arch`, as the ranks of `mesh` hold them."""

    def __init__(self, mesh: Mesh, arch: ErnieConfig) -> None:
        self._mesh, self._arch = mesh, arch
        self._axis, self._cut = mesh.axis("tensor"), Cut.of(mesh.layout, mesh.rank)

    def shape(self, name: str, held: list[int]) -> list[int]:
        """The shape of the whole parameter of which this rank holds one of shape `held`."""
        slot, whole = slot_of(name), list(held)
        if slot.style.experts:
            whole[0] *= self._mesh.layout.expert
        if slot.dim is not None and not self._whole(slot.style):
            copies = max(self._axis.size // self._arch.num_key_value_heads, 1) if slot.style.unit == "kv_heads" else 1
            whole[slot.dim] *= self._axis.size // copies
        return whole

    def part(self, name: str, array: np.ndarray) -> np.ndarray:
        """What this rank holds of a whole array; of routed experts, one of all of them or of those held here."""
        if slot_of(name).style.experts and self._mesh.layout.expert > 1:
            held = self._cut.experts(self._num_experts())
            array = array if len(array) == len(held) else array[held.start : held.stop]
        dim, ranges = held_ranges(name, array.shape, self._cut, self._arch)
        if dim is None:
            return array
        return np.concatenate([array.take(range(held.start, held.stop), axis=dim) for held in ranges], dim)

    def gathered(self, name: str, array: np.ndarray) -> np.ndarray:
        """The whole of `array` in all dimensions but that of experts. Every tensor rank calls this."""
        slot = slot_of(name)
        dim = slot.dim
        if self._axis.size == 1 or dim is None or self._whole(slot.style):
            return array
        parts = self._axis.all_gather(paddle.to_tensor(np.ascontiguousarray(array)).unsqueeze(0)).numpy()
        shape = self.shape(name, list(array.shape))
        whole = np.empty([*array.shape[:1], *shape[1:]] if slot.style.experts else shape, array.dtype)
        for rank, part in zip(self._axis.ranks, parts, strict=True):
            cut = Cut.of(self._mesh.layout, rank)
            _, ranges = held_ranges(name, whole.shape, cut, self._arch)
            start = 0
            for held in ranges:
                place: list[slice] = [slice(None)] * whole.ndim
                place[dim] = held
                size = held.stop - held.start
                whole[tuple(place)] = part.take(range(start, start + size), axis=dim)
                start += size
        return whole

    def adder(self, module: str) -> Callable[[Tensor], Tensor] | None:
        """What adds up sums over the inputs of a linear layer, where every rank has some of them; None: each has all.
        Every tensor rank calls it."""
        if self._axis.size == 1 or slot_of(f"{module}.weight").style.kind != "row":
            return None
        return lambda sums: self._axis.all_reduce(sums.detach().clone())

    def greatest(self, module: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """What finds the greatest numbers over all inputs of a linear layer or of stacked experts, as `adder`."""
        style = slot_of(module if ".experts." in module else f"{module}.weight").style
        if self._axis.size == 1 or style.kind != "row" or self._whole(style):
            return None
        return lambda found: self._axis.all_reduce(paddle.to_tensor(found), op="max").numpy()

    def _whole(self, style: Style) -> bool:
        """Whether tensor ranks hold whole experts instead of slices."""
        return style.experts and self._mesh.layout.experts_over == "tensor"

    def _num_experts(self) -> int:
        assert isinstance(self._arch.moe_num_experts, int)
        return self._arch.moe_num_experts
