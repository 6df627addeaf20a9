"""PyLayer of the tiled attention kernel.

Shapes: B batch, S rows, X = query heads * head_dim, Y = key heads * head_dim, J = head_dim / 2, N query heads.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import library
from erniekit.ops.gradients import only, wanted


class Attention(paddle.autograd.PyLayer):
    """Rotation of q and k, then attention under column bounds."""

    @staticmethod
    def forward(ctx, q_BSX, k_BSY, v_BSY, cos_BSJ, sin_BSJ, end_rows_BS, head_dim: int):
        ctx.wanted = wanted(q_BSX, k_BSY, v_BSY)
        b, s = q_BSX.shape[:2]
        ctx.sizes = (b, s, q_BSX.shape[2] // head_dim, k_BSY.shape[2] // head_dim, head_dim)
        tensors = (q_BSX, k_BSY, v_BSY, cos_BSJ, sin_BSJ, end_rows_BS.astype("int32"))
        inputs = [x.contiguous() for x in tensors]
        out_BSX, log_sums_BNS = paddle.empty(q_BSX.shape, "float32"), paddle.empty([b, ctx.sizes[2], s], "float32")
        library().call("attention_forward", *inputs, out_BSX, log_sums_BNS, *ctx.sizes)
        ctx.save_for_backward(*inputs, out_BSX, log_sums_BNS)
        return out_BSX

    @staticmethod
    def backward(ctx, grad_BSX):
        saved = ctx.saved_tensor()
        grads = [paddle.empty_like(t) for t in saved[:3]]
        library().call("attention_backward", *saved, grad_BSX.contiguous(), *grads, *ctx.sizes)
        return (*only(ctx.wanted, grads), None, None, None)
