"""Attention with dropout on its weights: block by block, forward and backward, in memory that grows with S, not S x S.

The plain twin of no kernel: there is no faster way here, and with probability 0 nobody comes this way. Which weights
are dropped follows from one number that every call draws (ops/dropout.py), so that the backward pass and a recomputed
forward pass drop the same ones and keep no mask.

Shapes: B batch, S rows, N query heads, K key/value heads, G = N / K, d head_dim, R rows of a block, C its columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import paddle

from erniekit.ops.attention import row_blocks
from erniekit.ops.dropout import drawn_seed
from erniekit.ops.gradients import only, wanted
from erniekit.ops.rope import rotate


class _Attention(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, q_BKGSd, k_BK1Sd, v_BK1Sd, end_rows_BS, dropout: float, stream: int):
        ctx.wanted = wanted(q_BKGSd, k_BK1Sd, v_BK1Sd)
        ctx.dropout, ctx.seed = dropout, drawn_seed(stream)
        ctx.save_for_backward(q_BKGSd, k_BK1Sd, v_BK1Sd, end_rows_BS)
        out = [
            paddle.matmul(weights * kept, v_BK1Sd[..., columns, :])
            for _, columns, weights, kept in _blocks(q_BKGSd, k_BK1Sd, end_rows_BS, dropout, ctx.seed)
        ]
        return paddle.concat(out, axis=3)

    @staticmethod
    def backward(ctx, grad_BKGSd):
        q_BKGSd, k_BK1Sd, v_BK1Sd, end_rows_BS = ctx.saved_tensor()
        grad_q, grad_k, grad_v = [], paddle.zeros_like(k_BK1Sd), paddle.zeros_like(v_BK1Sd)
        for rows, columns, weights, kept in _blocks(q_BKGSd, k_BK1Sd, end_rows_BS, ctx.dropout, ctx.seed):
            grad_out, q, k, v = grad_BKGSd[..., rows, :], q_BKGSd[..., rows, :], *_slices(columns, k_BK1Sd, v_BK1Sd)
            grad_v[..., columns, :] += paddle.matmul(weights * kept, grad_out, transpose_x=True).sum(2, keepdim=True)
            grad_weights = paddle.matmul(grad_out, v, transpose_y=True) * kept
            inner = (grad_weights * weights).sum(-1, keepdim=True)
            grad_scores = weights * (grad_weights - inner) * q.shape[-1] ** -0.5
            grad_q.append(paddle.matmul(grad_scores, k))
            grad_k[..., columns, :] += paddle.matmul(grad_scores, q, transpose_x=True).sum(2, keepdim=True)
        return (*only(ctx.wanted, (paddle.concat(grad_q, axis=3), grad_k, grad_v)), None)


def _slices(columns: slice, *tensors: paddle.Tensor) -> list[paddle.Tensor]:
    return [tensor[..., columns, :] for tensor in tensors]


def _blocks(
    q_BKGSd: paddle.Tensor, k_BK1Sd: paddle.Tensor, end_rows_BS: paddle.Tensor, dropout: float, seed: int
) -> Iterator[tuple[slice, slice, paddle.Tensor, paddle.Tensor]]:
    """(rows, columns, softmax weights, what dropout multiplies them with), the last two [B, K, G, R, C]."""
    for number, (rows, columns, visible_BRC) in enumerate(row_blocks(end_rows_BS)):
        visible = visible_BRC.unsqueeze([1, 2])
        scores = paddle.matmul(q_BKGSd[..., rows, :], k_BK1Sd[..., columns, :], transpose_y=True)
        scores = paddle.where(visible, scores * q_BKGSd.shape[-1] ** -0.5, paddle.full([1], -1e30, "float32"))
        weights = paddle.exp(scores - scores.max(-1, keepdim=True)) * visible.astype("float32")
        drawn = paddle.uniform(weights.shape, "float32", 0.0, 1.0, seed=seed + number)
        kept = (drawn >= dropout).astype("float32") / (1.0 - dropout)
        yield rows, columns, weights / weights.sum(-1, keepdim=True), kept


def attention_with_dropout(
    q_BSX: paddle.Tensor, k_BSY: paddle.Tensor, v_BSY: paddle.Tensor, *, cos_BSJ: paddle.Tensor,
    sin_BSJ: paddle.Tensor, end_rows_BS: paddle.Tensor, head_dim: int, dropout: float,
    stream: int = 0,
) -> paddle.Tensor:  # fmt: skip
    """`attention` whose softmax weights are dropped with probability `dropout`, the others scaled up; in fp32."""
    b, s = q_BSX.shape[:2]
    q = rotate(q_BSX.reshape([b, s, -1, head_dim]), cos_BSJ, sin_BSJ)
    k = rotate(k_BSY.reshape([b, s, -1, head_dim]), cos_BSJ, sin_BSJ)
    k, v = (x.reshape([b, s, -1, 1, head_dim]).transpose([0, 2, 3, 1, 4]) for x in (k, v_BSY))
    q = q.reshape([b, s, k.shape[1], -1, head_dim]).transpose([0, 2, 3, 1, 4])
    # Contiguous: Paddle's recomputation hands saved tensors back without their strides.
    out = _Attention.apply(*(x.astype("float32").contiguous() for x in (q, k, v)), end_rows_BS, dropout, stream)
    return out.astype(q_BSX.dtype).transpose([0, 3, 1, 2, 4]).reshape([b, s, -1])
