"""Grouped-query attention with rotary positions.

Head counts are inferred from the tensors, so that slicing the projections from outside (tensor parallelism) needs no
change here. Shapes: B batch, S rows, D hidden size, d head_dim, X = query heads * d, Y = key heads * d, J = d / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import nn

from erniekit.config.architecture import ErnieConfig
from erniekit.models.cache import Kept, LayerCache
from erniekit.models.layers import Linear
from erniekit.ops.attention import attention
from erniekit.ops.attention_dropout import attention_with_dropout
from erniekit.ops.cached_attention import cached_attention
from erniekit.ops.rope import rope_tables, rotate


@dataclass(frozen=True)
class Positions:
    """What attention must know of a batch: rotation tables and the column bounds of the mask (ops/attention.py)."""

    cos_BSJ: paddle.Tensor
    sin_BSJ: paddle.Tensor
    end_rows_BS: paddle.Tensor | None  # None while generating with a cache

    @classmethod
    def of(cls, position_ids_BS: paddle.Tensor, end_rows_BS: paddle.Tensor | None, cfg: ErnieConfig) -> Positions:
        """Build the tables for one batch; every layer shares them."""
        cos, sin = rope_tables(position_ids_BS, head_dim=cfg.head_dim, theta=cfg.rope_theta)
        return cls(cos, sin, end_rows_BS)

    def turned_by_none(self) -> Positions:
        """The same mask for queries and keys that are rotated already."""
        return Positions(paddle.ones_like(self.cos_BSJ), paddle.zeros_like(self.sin_BSJ), self.end_rows_BS)


class CoreAttention(nn.Layer):
    """Rotation and softmax(q k^T) v; no parameters. A layer of its own so that it can be recomputed alone."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout, self.stream = 0.0, 0  # of the weights, in training (ops/dropout.py); set from outside

    def forward(
        self, q_BSX: paddle.Tensor, k_BSY: paddle.Tensor, v_BSY: paddle.Tensor, positions: Positions
    ) -> paddle.Tensor:
        """[B, S, X], [B, S, Y], [B, S, Y] -> [B, S, X]."""
        if self.dropout and self.training:
            return attention_with_dropout(
                q_BSX, k_BSY, v_BSY, cos_BSJ=positions.cos_BSJ, sin_BSJ=positions.sin_BSJ,
                end_rows_BS=positions.end_rows_BS, head_dim=self.head_dim, dropout=self.dropout,
                stream=self.stream,
            )  # fmt: skip
        return attention(
            q_BSX, k_BSY, v_BSY, cos_BSJ=positions.cos_BSJ, sin_BSJ=positions.sin_BSJ,
            end_rows_BS=positions.end_rows_BS, head_dim=self.head_dim,
        )  # fmt: skip


class Attention(nn.Layer):
    """Projections around CoreAttention. `kept` is a slot: the form in which a cache holds rotated keys and values;
    attention without a cache sees them as they would come out of one."""

    def __init__(self, cfg: ErnieConfig, *, dtype: str) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, cfg.q_dim, bias=cfg.use_bias, dtype=dtype)
        self.k_proj = Linear(cfg.hidden_size, cfg.kv_dim, bias=cfg.use_bias, dtype=dtype)
        self.v_proj = Linear(cfg.hidden_size, cfg.kv_dim, bias=cfg.use_bias, dtype=dtype)
        self.o_proj = Linear(cfg.q_dim, cfg.hidden_size, bias=cfg.use_bias, dtype=dtype)
        self.core_attn = CoreAttention(cfg.head_dim)
        self.kept: Kept | None = None

    def forward(self, x_BSD: paddle.Tensor, positions: Positions, cache: LayerCache | None = None) -> paddle.Tensor:
        """[B, S, D] -> [B, S, D]; with a cache, S new tokens of every row attend to all of their row."""
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if cache is None and self.kept is None:
            return self.o_proj(self.core_attn(q, k, v, positions))
        b, s = x_BSD.shape[:2]
        q, k, v = (t.reshape([b, s, -1, self.head_dim]) for t in (q, k, v))
        q, k = (rotate(t, positions.cos_BSJ, positions.sin_BSJ) for t in (q, k))
        if cache is None:
            assert self.kept is not None
            seen = q, self.kept.keys.rounded(k), self.kept.values.rounded(v)
            return self.o_proj(self.core_attn(*(t.flatten(2) for t in seen), positions.turned_by_none()))
        k_BKTd, v_BKTd = cache.append(k, v)
        return self.o_proj(cached_attention(q, k_BKTd, v_BKTd, cache.rows.visible_BST))
