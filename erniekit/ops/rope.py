"""Rotary position embedding, interleaved pairs (2j, 2j+1) (RoFormer, arXiv 2104.09864; ERNIE 4.5 pairs neighbours).

Shapes: B batch, S positions, N heads, J = head_dim / 2 pairs.
"""

from __future__ import annotations

import paddle


def rope_tables(position_ids_BS: paddle.Tensor, *, head_dim: int, theta: float) -> tuple[paddle.Tensor, paddle.Tensor]:
    """cos and sin of pos * theta^(-2j / head_dim): two fp32 tensors [B, S, J]."""
    exponent_J = paddle.arange(0, head_dim, 2, dtype="float32") / head_dim
    inverse_J = 1.0 / paddle.pow(paddle.full_like(exponent_J, theta), exponent_J)
    angle_BSJ = position_ids_BS.astype("float32").unsqueeze(-1) * inverse_J
    return angle_BSJ.cos(), angle_BSJ.sin()


def rotate(x_BSNd: paddle.Tensor, cos_BSJ: paddle.Tensor, sin_BSJ: paddle.Tensor) -> paddle.Tensor:
    """Rotate every pair of x [B, S, N, head_dim] by its angle, in fp32; the result has x's type."""
    b, s, n, d = x_BSNd.shape
    pairs = x_BSNd.astype("float32").reshape([b, s, n, d // 2, 2])
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_BSJ.unsqueeze(2), sin_BSJ.unsqueeze(2)
    turned = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape([b, s, n, d]).astype(x_BSNd.dtype)
