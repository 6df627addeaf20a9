"""The adapters themselves: layers that sit in a slot of a Linear or of the routed experts (models/layers.py, moe.py).

Shapes: D in, F out, R rank, T routed rows, E experts; `...` any leading dimensions. Parameters start at zero: lora.py
says what is in them. Know nothing of names, files and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import nn

from erniekit.config.adapter import AdapterConfig
from erniekit.models.layers import Linear, parameter
from erniekit.ops.dropout import dropout
from erniekit.ops.low_rank import grouped_low_rank, low_rank


class Adapter(nn.Layer):
    """Two factors, A and B, of a product that is added to the base's. `shape` is that of the weight: [in, out], or
    [experts, in, out]."""

    def __init__(self, shape: list[int], config: AdapterConfig, *, dtype: str) -> None:
        super().__init__()
        *experts, num_in, num_out = shape
        self.scaling, self.dropout = config.scaling, config.dropout
        self.stream = 0  # of the numbers that are dropped (ops/dropout.py); set from outside
        self.lora_A = parameter(self, [*experts, num_in, config.rank], dtype=dtype)
        self.lora_B = parameter(self, [*experts, config.rank, num_out], dtype=dtype)
        self.initial_A: paddle.Tensor | None = None
        self.initial_B: paddle.Tensor | None = None
        if config.init == "pissa":
            self.initial_A = parameter(self, self.lora_A.shape, dtype=dtype, trainable=False)
            self.initial_B = parameter(self, self.lora_B.shape, dtype=dtype, trainable=False)

    def factors(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """A and B of what is added to the base: with PiSSA, of rank 2 R, what was learned less where it began.

        The base itself never changes, so that it is there bit for bit when adapters are off, and so that what is
        learned is a plain adapter of rank 2 R.
        """
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        a = paddle.concat([self.lora_A, self.initial_A], axis=-1)
        return a, paddle.concat([self.lora_B, -self.initial_B], axis=-2)

    def thinned(self, x: paddle.Tensor) -> paddle.Tensor:
        """What enters A: dropout in training."""
        return dropout(x, self.dropout, stream=self.stream) if self.dropout and self.training else x


class LinearAdapter(Adapter):
    """For a Linear: y + scaling * (x A) B."""

    def forward(self, x_D: paddle.Tensor, y_F: paddle.Tensor, _layer: Linear) -> paddle.Tensor:
        """x [..., D] and the base's product y [..., F] -> [..., F]."""
        return low_rank(self.thinned(x_D), y_F, *self.factors(), scale=self.scaling)


class ExpertsAdapter(Adapter):
    """For one of the stacked weights of routed experts: a pair of factors for each expert, one A for gate and up."""

    def forward(self, x_TD: paddle.Tensor, y_TF: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """Rows sorted by expert and the base's product -> [T, F]."""
        return grouped_low_rank(self.thinned(x_TD), y_TF, *self.factors(), counts=counts, scale=self.scaling)


class DoraAdapter(LinearAdapter):
    """For a Linear, with the length of every column trained apart (arXiv 2402.09353): m (W + s A B) / |W + s A B|.

    The length is detached from the gradient, as the paper advises (4.3) and PEFT does. `add_up` is a slot: what adds up
    sums over inputs where the layer has only some of them.
    """

    def __init__(self, shape: list[int], config: AdapterConfig, *, dtype: str) -> None:
        super().__init__(shape, config, dtype=dtype)
        self.magnitude = parameter(self, [shape[-1]], dtype=dtype)
        self.add_up: Callable[[paddle.Tensor], paddle.Tensor] | None = None
        self._base_squares_F: paddle.Tensor | None = None

    def forward(self, x_D: paddle.Tensor, y_F: paddle.Tensor, layer: Linear) -> paddle.Tensor:
        """x [..., D] and the base's product y [..., F] -> [..., F]."""
        ratio_F = self.magnitude / self.lengths(layer).astype(self.magnitude.dtype)
        return super().forward(x_D, y_F, layer) * ratio_F

    @paddle.no_grad()
    def lengths(self, layer: Linear) -> paddle.Tensor:
        """The 2-norm of every column of W + s A B, fp32, without making that matrix:
        |w + s A b|^2 = |w|^2 + 2 s (A^T w) b + s^2 b^T (A^T A) b, and A^T W is a product of the layer itself."""
        if self._base_squares_F is None:
            self._base_squares_F = self.base_squares(layer)
        a_DR, b_RF = (factor.astype("float32") for factor in self.factors())
        crossed_RF = layer.multiplied(a_DR.t().contiguous().astype(self.lora_A.dtype)).astype("float32")
        gram_RR = paddle.matmul(a_DR, a_DR, transpose_x=True)
        if self.add_up is not None:
            crossed_RF, gram_RR = self.add_up(crossed_RF), self.add_up(gram_RR)
        added_RF = 2.0 * self.scaling * crossed_RF + self.scaling**2 * paddle.matmul(gram_RR, b_RF)
        return paddle.sqrt((self._base_squares_F + (added_RF * b_RF).sum(0)).clip(min=0.0))


    @paddle.no_grad()
    def base_squares(self, layer: Linear) -> paddle.Tensor:
        """The sum of squares of every column of a layer's weight, fp32 [F]."""
        found = paddle.square(dense_weight(layer).astype("float32")).sum(0)
        return found if self.add_up is None else self.add_up(found)


def dense_weight(layer: Linear) -> paddle.Tensor:
    """A layer's weight [in, out], unpacked if it is packed."""
    return layer.weight if layer.packed is None else layer.packed.dense()
