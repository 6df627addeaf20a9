"""The same products by Paddle's weight-only GPU kernels: int8, int4, a scale per output or per 64 or 128 inputs.

Not run: there was no GPU at hand, and on a CPU Paddle has none of these kernels. What the docstrings and signatures of
Paddle 3.3.1 say was followed. Codes lie in the order of Paddle's kernels, told by `weight_quantize` alone.
Shapes: T rows sorted by expert, D inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import paddle
from paddle.nn.quant import weight_dequantize, weight_only_linear, weight_quantize

GROUP_SIZES = (None, 64, 128)
_SIZES = 64  # inputs and outputs come in multiples of this


class WeightOnly(NamedTuple):
    """One weight [D, F] as Paddle's kernels hold it; `bits` is "int8" or "int4"."""

    codes: paddle.Tensor
    scales: paddle.Tensor
    bits: str
    group_size: int  # -1: one scale per output

    def dense(self) -> paddle.Tensor:
        """The weight [D, F] in the number format of its scales."""
        return weight_dequantize(self.codes, self.scales, f"weight_only_{self.bits}", group_size=self.group_size)


def serves(kind: str, num_in: int, num_out: int, group_size: int | None) -> bool:
    """Whether Paddle has kernels for such a weight."""
    sizes = num_in % _SIZES == 0 and num_out % _SIZES == 0
    return kind in ("int8", "int4") and sizes and group_size in GROUP_SIZES


def quantized(weight_DF: paddle.Tensor, bits: str, *, group_size: int | None) -> WeightOnly:
    """A bf16 weight in Paddle's layout."""
    size = -1 if group_size is None else group_size
    codes, scales = weight_quantize(weight_DF, f"weight_only_{bits}", group_size=size)
    return WeightOnly(codes, scales.astype(weight_DF.dtype), bits, size)


class _Product(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weights: Sequence[WeightOnly], counts: list[int]):
        ctx.weights, ctx.counts, ctx.num_in = weights, counts, x_TD.shape[1]
        out, start = [], 0
        for weight, count in zip(weights, counts, strict=True):
            if count:
                out.append(
                    weight_only_linear(
                        x_TD[start : start + count], weight.codes, weight_scale=weight.scales,
                        weight_dtype=weight.bits, group_size=weight.group_size,
                    )
                )  # fmt: skip
            start += count
        return paddle.concat(out) if out else paddle.zeros([0, weights[0].dense().shape[1]], x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_TF):
        out, start = [], 0
        for weight, count in zip(ctx.weights, ctx.counts, strict=True):
            if count:
                out.append(paddle.matmul(grad_TF[start : start + count], weight.dense(), transpose_y=True))
            start += count
        return paddle.concat(out) if out else paddle.zeros([0, ctx.num_in], grad_TF.dtype)


def weight_only_product(x_TD: paddle.Tensor, weights: Sequence[WeightOnly], *, counts: list[int]) -> paddle.Tensor:
    """x @ weight_e for rows sorted by expert; the weights have no gradient."""
    return _Product.apply(x_TD, weights, counts)
