"""Causal attention with rotary positions, grouped key/value heads and FlashMask column intervals.

A mask is one int32 per column, `end_rows_BS` (FlashMask, arXiv 2410.01359, causal with one bound): the key at column j
is seen by the rows j <= i < end_rows[j]. Plain causal attention has end_rows = S; a packed row ends every column at the
end of its document; padding ends at j + 1 (it sees only itself). The bounds need not rise: of two answers that share
their prompt, the prompt's columns end behind both and the first answer's before the second (data/batch.py). No S x S
mask is ever part of the interface.

Shapes: B batch, S row length, N query heads, K key/value heads, d head_dim, X = N*d, Y = K*d, J = d/2.
"""

from __future__ import annotations

from collections.abc import Iterator

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import attention as cpu
from erniekit.ops.dispatch import backend
from erniekit.ops.rope import rotate

_BLOCK_ROWS = 256  # of the plain twin

def end_rows_from_segments(segment_ids_BS: paddle.Tensor) -> paddle.Tensor:
    """Column bounds of packed documents: ids 1, 2, ... in contiguous runs, 0 = padding. Returns int32 [B, S]."""
    s = segment_ids_BS.shape[1]
    ones = paddle.ones_like(segment_ids_BS[:, :1]) > 0
    last = paddle.concat([segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1], ones], 1)
    position = paddle.arange(1, s + 1, dtype="int32")
    ends = paddle.where(last, position, paddle.full_like(position, s + 1))
    # The nearest document end at or after each column: a minimum running from the right.
    nearest = paddle.flip(paddle.cummin(paddle.flip(ends, [1]), axis=1)[0], [1])
    return paddle.where(segment_ids_BS == 0, position, nearest).astype("int32")


def positions_in_segments(segment_ids_BS: paddle.Tensor) -> paddle.Tensor:
    """Positions that count from 0 in every document: int64 [B, S]."""
    count = paddle.arange(segment_ids_BS.shape[1], dtype="int64").unsqueeze(0).expand_as(segment_ids_BS)
    ones = paddle.ones_like(segment_ids_BS[:, :1]) > 0
    first = paddle.concat([ones, segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]], 1)
    return count - paddle.cummax(paddle.where(first, count, paddle.zeros_like(count)), axis=1)[0]


def end_rows_from_mask(attention_mask_BS: paddle.Tensor) -> paddle.Tensor:
    """Column bounds from a 0/1 padding mask: real tokens are seen to the end of the row. Returns int32 [B, S]."""
    s = attention_mask_BS.shape[1]
    position = paddle.arange(1, s + 1, dtype="int32")
    return paddle.where(attention_mask_BS > 0, paddle.full_like(position, s), position).astype("int32")


def row_blocks(end_rows_BS: paddle.Tensor) -> Iterator[tuple[slice, slice, paddle.Tensor]]:
    """Blocks of rows and the columns that any of them sees: (rows, columns, bool [B, rows, columns])."""
    s = end_rows_BS.shape[1]
    position = paddle.arange(s, dtype="int32")
    for start in range(0, s, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, s)
        first = (end_rows_BS > start).any(0).astype("int32").argmax().item()  # columns before it have ended
        row_S1, column_T = position[start:stop].unsqueeze(-1), position[first:stop]
        visible_BST = (row_S1 >= column_T) & (row_S1 < end_rows_BS[:, first:stop].unsqueeze(1))
        yield slice(start, stop), slice(first, stop), visible_BST


def attention_plain(
    q_BSX: paddle.Tensor, k_BSY: paddle.Tensor, v_BSY: paddle.Tensor, *,
    cos_BSJ: paddle.Tensor, sin_BSJ: paddle.Tensor, end_rows_BS: paddle.Tensor, head_dim: int,
) -> paddle.Tensor:  # fmt: skip
    """The plain twin of `attention`: blocks of rows against the columns that any of them sees; never an S x S mask."""
    b, s = q_BSX.shape[:2]
    q = rotate(q_BSX.reshape([b, s, -1, head_dim]), cos_BSJ, sin_BSJ)
    k = rotate(k_BSY.reshape([b, s, -1, head_dim]), cos_BSJ, sin_BSJ)
    v = v_BSY.reshape([b, s, -1, head_dim])
    out = [
        _attend(q[:, rows], k[:, columns], v[:, columns], visible_BST.unsqueeze(1))
        for rows, columns, visible_BST in row_blocks(end_rows_BS)
    ]
    return paddle.concat(out, axis=1).reshape([b, s, -1])


def _attend(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, visible: paddle.Tensor) -> paddle.Tensor:
    """softmax(q k^T / sqrt(d)) v with fp32 softmax; q [B, S, N, d], k and v [B, T, K, d], visible [B, 1, S, T].

    The softmax is written out: Paddle's CPU operators never give less than e^-64 (exp: e^-88), and a masked column
    must give 0.
    """
    b, s, n, d = q.shape
    groups = k.shape[2]
    q = q.transpose([0, 2, 1, 3]).reshape([b, groups, n // groups, s, d])
    k, v = k.transpose([0, 2, 1, 3]).unsqueeze(2), v.transpose([0, 2, 1, 3]).unsqueeze(2)
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32") * d**-0.5
    scores = paddle.where(visible.unsqueeze(1), scores, paddle.full([1], -1e30, "float32"))
    weights = paddle.exp(scores - scores.max(-1, keepdim=True).detach()) * visible.unsqueeze(1).astype("float32")
    out = paddle.matmul((weights / weights.sum(-1, keepdim=True)).astype(v.dtype), v)
    return out.reshape([b, n, s, d]).transpose([0, 2, 1, 3])


def _attention_gpu(q_BSX, k_BSY, v_BSY, *, cos_BSJ, sin_BSJ, end_rows_BS, head_dim) -> paddle.Tensor:
    b, s = q_BSX.shape[:2]
    q = rotate(q_BSX.reshape([b, s, -1, head_dim]), cos_BSJ, sin_BSJ)
    k = rotate(k_BSY.reshape([b, s, -1, head_dim]), cos_BSJ, sin_BSJ)
    v = v_BSY.reshape([b, s, -1, head_dim])
    bounds = end_rows_BS.astype("int32").reshape([b, 1, s, 1])
    return F.flashmask_attention(q, k, v, startend_row_indices=bounds, causal=True).reshape([b, s, -1])


def attention(
    q_BSX: paddle.Tensor, k_BSY: paddle.Tensor, v_BSY: paddle.Tensor, *,
    cos_BSJ: paddle.Tensor, sin_BSJ: paddle.Tensor, end_rows_BS: paddle.Tensor, head_dim: int,
) -> paddle.Tensor:  # fmt: skip
    """Rotate q and k, attend under the column bounds; returns [B, S, X]. Heads are inferred from the tensors."""
    place = backend(q_BSX, k_BSY, v_BSY)
    if place == "gpu" and q_BSX.dtype == paddle.float32:
        place = "plain"  # FlashMask takes half precision only
    chosen = {"cpu": cpu.attention, "gpu": _attention_gpu, "plain": attention_plain}[place]
    return chosen(
        q_BSX, k_BSY, v_BSY, cos_BSJ=cos_BSJ, sin_BSJ=sin_BSJ, end_rows_BS=end_rows_BS, head_dim=head_dim
    )  # fmt: skip
