"""The small layers every block is made of. Weights are [in, out]; names equal those of the -PT checkpoints.

`Linear` is the seam where adapters, number formats and tensor shards take hold from outside.
Shapes: B batch, S positions, D hidden size, I width.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import nn

from erniekit.ops.mlp import linear, swiglu
from erniekit.ops.norm import rms_norm


def parameter(layer: nn.Layer, shape: list[int], *, dtype: str, trainable: bool = True) -> paddle.Tensor:
    """A zero parameter of `layer`: checkpoints fill every one, so nothing is drawn here."""
    made = layer.create_parameter(shape, dtype=dtype, default_initializer=nn.initializer.Constant(0.0))
    made.stop_gradient = not trainable
    return made


class Linear(nn.Layer):
    """x @ weight (+ bias); weight [in, out].

    Four slots are filled from outside: `product`, which makes x @ weight from the two in its own way; `packed`, a layer
    that holds the weight in fewer bits and makes the product in its stead (`weight` is None then); `adapter`, which is
    shown the input and the product without bias and returns the product that counts; and `leave`, through which that
    product goes before the bias is added.
    """

    bf16_products = False  # precision/products.py

    def __init__(self, num_in: int, num_out: int, *, bias: bool, dtype: str) -> None:
        super().__init__()
        self.num_in, self.num_out = num_in, num_out
        self.weight = parameter(self, [num_in, num_out], dtype=dtype)
        self.bias = parameter(self, [num_out], dtype=dtype) if bias else None
        self.product: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor] | None = None
        self.packed: nn.Layer | None = None
        self.adapter: nn.Layer | None = None
        self.leave: Callable[[paddle.Tensor], paddle.Tensor] | None = None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]."""
        if all(slot is None for slot in (self.product, self.packed, self.adapter, self.leave)):
            return linear(x, self.weight, self.bias, bf16=self.bf16_products)
        y = self.multiplied(x)
        if self.adapter is not None:
            y = self.adapter(x, y, self)
        if self.leave is not None:
            y = self.leave(y)
        return y if self.bias is None else y + self.bias

    def multiplied(self, x: paddle.Tensor) -> paddle.Tensor:
        """x @ weight of the base, without bias and adapter."""
        if self.product is not None:
            return self.product(x, self.weight)
        return linear(x, self.weight, None, bf16=self.bf16_products) if self.packed is None else self.packed(x)


class RMSNorm(nn.Layer):
    """Root-mean-square norm with a weight and no bias."""

    def __init__(self, size: int, *, eps: float, dtype: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(self, [size], dtype=dtype)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, eps=self.eps)


class Embedding(nn.Layer):
    """Rows of a [V, D] table. `lookup` is a slot: what finds them, given the ids and the table."""

    def __init__(self, num: int, size: int, *, dtype: str) -> None:
        super().__init__()
        self.weight = parameter(self, [num, size], dtype=dtype)
        self.lookup: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor] = F.embedding

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """int64 [...] -> [..., D]."""
        return self.lookup(ids, self.weight)


class MLP(nn.Layer):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, width: int, *, bias: bool, dtype: str) -> None:
        super().__init__()
        self.gate_proj = Linear(size, width, bias=bias, dtype=dtype)
        self.up_proj = Linear(size, width, bias=bias, dtype=dtype)
        self.down_proj = Linear(width, size, bias=bias, dtype=dtype)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
