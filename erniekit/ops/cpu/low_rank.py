"""The product of low-rank adapters on its kernels (csrc/low_rank.cpp).

Shapes: T rows sorted by expert, D in, F out, E experts, R rank; `...` any leading dimensions.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import call
from erniekit.ops.gradients import wanted


class _LowRank(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_D, y_F, a_EDR, b_ERF, counts_E, scale: float):
        ctx.wanted, ctx.scale = wanted(x_D, y_F, a_EDR, b_ERF), scale
        x_D, y_F, a_EDR, b_ERF = (tensor.contiguous() for tensor in (x_D, y_F, a_EDR, b_ERF))
        rank, width = b_ERF.shape[-2:]
        ctx.sizes = (counts_E.size, x_D.shape[-1], rank, width)
        hidden_TR = paddle.empty([x_D.size // x_D.shape[-1], rank], "float32")
        out_F = paddle.empty_like(y_F)
        call("low_rank_forward", x_D, y_F, a_EDR, b_ERF, counts_E, hidden_TR, out_F, *ctx.sizes, scale)
        ctx.save_for_backward(x_D, a_EDR, b_ERF, counts_E, hidden_TR)
        return out_F

    @staticmethod
    def backward(ctx, grad_F):
        saved = ctx.saved_tensor()
        x_wanted, y_wanted, *factors_wanted = ctx.wanted
        asked = zip(saved[:3], (x_wanted, *factors_wanted), strict=True)
        grad_x, grad_a, grad_b = (paddle.empty_like(tensor) if want else None for tensor, want in asked)
        if grad_x is not None or any(factors_wanted):
            call("low_rank_backward", *saved, grad_F.contiguous(), grad_x, grad_a, grad_b, *ctx.sizes, ctx.scale)
        return grad_x, grad_F if y_wanted else None, grad_a, grad_b, None


def grouped_low_rank(
    x_TD: paddle.Tensor, y_TF: paddle.Tensor, a_EDR: paddle.Tensor, b_ERF: paddle.Tensor, *, counts: list[int],
    scale: float,
) -> paddle.Tensor:  # fmt: skip
    """One adapter per expert over its rows."""
    return _LowRank.apply(x_TD, y_TF, a_EDR, b_ERF, paddle.to_tensor(counts, "int64"), scale)


def low_rank(
    x_D: paddle.Tensor, y_F: paddle.Tensor, a_DR: paddle.Tensor, b_RF: paddle.Tensor, *, scale: float
) -> paddle.Tensor:
    """One adapter over all rows."""
    rows = paddle.to_tensor([x_D.size // x_D.shape[-1]], "int64")
    return _LowRank.apply(x_D, y_F, a_DR, b_RF, rows, scale)
