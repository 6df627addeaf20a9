"""Attention on the tiled kernel (csrc/attention.cpp).

Shapes: B batch, S rows, X = query heads * head_dim, Y = key heads * head_dim, J = head_dim / 2, N query heads.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import call
from erniekit.ops.gradients import only, wanted


class _Attention(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, q_BSX, k_BSY, v_BSY, cos_BSJ, sin_BSJ, end_rows_BS, head_dim: int):
        ctx.wanted = wanted(q_BSX, k_BSY, v_BSY)
        b, s, x = q_BSX.shape
        ctx.sizes = (b, s, x // head_dim, k_BSY.shape[2] // head_dim, head_dim)
        tensors = (q_BSX, k_BSY, v_BSY, cos_BSJ, sin_BSJ, end_rows_BS.astype("int32"))
        inputs = [tensor.contiguous() for tensor in tensors]
        out_BSX, log_sums_BNS = paddle.empty([b, s, x], "float32"), paddle.empty([b, x // head_dim, s], "float32")
        call("attention_forward", *inputs, out_BSX, log_sums_BNS, *ctx.sizes)
        ctx.save_for_backward(*inputs, out_BSX, log_sums_BNS)
        return out_BSX

    @staticmethod
    def backward(ctx, grad_BSX):
        saved = ctx.saved_tensor()
        grads = [paddle.empty_like(tensor) for tensor in saved[:3]]
        call("attention_backward", *saved, grad_BSX.contiguous(), *grads, *ctx.sizes)
        return (*only(ctx.wanted, grads), None, None, None)


def attention(
    q_BSX: paddle.Tensor, k_BSY: paddle.Tensor, v_BSY: paddle.Tensor, *,
    cos_BSJ: paddle.Tensor, sin_BSJ: paddle.Tensor, end_rows_BS: paddle.Tensor, head_dim: int,
) -> paddle.Tensor:  # fmt: skip
    """Rotate q and k, attend under the column bounds; memory O(S), never S x S."""
    return _Attention.apply(q_BSX, k_BSY, v_BSY, cos_BSJ, sin_BSJ, end_rows_BS, head_dim)
