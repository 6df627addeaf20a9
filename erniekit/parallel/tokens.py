"""Whose tokens a rank's routers see: what statistics over all tokens of a micro-step are summed over.

Data ranks have tokens of their own. Tensor ranks all see those of their data rank, and must not count them again, but
where they share the experts under sequence parallelism: there the routers of each see a part of every row.
Shapes: B rows, S positions, M tokens that a rank's routers see.
"""

from __future__ import annotations

from paddle import Tensor

from erniekit.parallel.mesh import Mesh
from erniekit.parallel.passing import reduce_out, sum_over


class TokenRanks:
    """The ranks whose routers see other tokens of the same micro-step."""

    def __init__(self, mesh: Mesh) -> None:
        self._data, self._tensor = mesh.axis("data"), mesh.axis("tensor")
        self._in_parts = mesh.layout.experts_over == "tensor" and mesh.layout.sequence_parallel

    def total(self, x: Tensor) -> Tensor:
        """The sum of a statistic over all tokens. Every data rank takes a share of the loss that is made of it, as of
        every mean over micro-batches (training/step.py: Totals.micro_batches); its tensor ranks take all of that."""
        return sum_over(reduce_out(x, self._tensor) if self._in_parts else x, self._data)

    def seen(self, mask_BS: Tensor) -> Tensor:
        """Of a mask over whole rows, the tokens that this rank's routers see: [M]."""
        if self._in_parts:
            mask_BS = mask_BS[:, self._tensor.share(mask_BS.shape[1])]
        return mask_BS.reshape([-1])

    def of_weights(self, x: Tensor) -> Tensor:
        """A term of the routers' weights alone. Where tensor ranks add up the gradients of these weights, it counts on
        one of them only."""
        return x.detach() if self._in_parts and self._tensor.index else x
