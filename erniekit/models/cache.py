"""Keys and values of what was generated so far, for several rows of different lengths.

A row's tokens stand in its columns from 0 on, so a column is a position and no padding is ever computed: every token
that enters the model is a real one, also for the routers of a mixture of experts. Rows leave and join between steps.
What is held may have another form than what attention reads: a slot of Attention says which (`Kept`).

Shapes: B rows, S new tokens of each row, K key/value heads, d head_dim, T columns there is room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import paddle

_CHUNK = 128  # columns by which the room grows


class Form(Protocol):
    """How keys, or values, are held."""

    def encode(self, x_BSKd: paddle.Tensor) -> paddle.Tensor:
        """As they are held, in the same shape."""

    def decode(self, held_BKTd: paddle.Tensor) -> paddle.Tensor:
        """As attention reads them."""

    def rounded(self, x_BSKd: paddle.Tensor) -> paddle.Tensor:
        """Encoded and decoded."""


class Kept(NamedTuple):
    """The forms of a layer."""

    keys: Form
    values: Form


class LayerCache:
    """Rotated keys and values of one layer: two tensors [B, K, T, d], as they come or as `kept` says."""

    def __init__(self, rows: KVCache, kept: Kept | None = None) -> None:
        self.rows, self.kept = rows, kept
        self.held: list[paddle.Tensor] = []

    def append(self, k_BSKd: paddle.Tensor, v_BSKd: paddle.Tensor) -> list[paddle.Tensor]:
        """Put the new tokens into their columns; returns all keys and all values, [B, K, T, d]."""
        if self.kept is None:
            return self._put(k_BSKd, v_BSKd)
        held = self._put(*(form.encode(x) for form, x in zip(self.kept, (k_BSKd, v_BSKd), strict=True)))
        return [form.decode(x) for form, x in zip(self.kept, held, strict=True)]

    def _put(self, k_BSKd: paddle.Tensor, v_BSKd: paddle.Tensor) -> list[paddle.Tensor]:
        b, s, heads, d = k_BSKd.shape
        room = self.rows.room
        held = self.held or [paddle.zeros([b, heads, 0, d], k_BSKd.dtype) for _ in range(2)]
        missing = room - held[0].shape[2]
        if missing:
            held = [paddle.concat([x, paddle.zeros([b, heads, missing, d], x.dtype)], axis=2) for x in held]
        self.held = held
        if b == 1:
            start = self.rows.lengths[0]
            for old, new in zip(held, (k_BSKd, v_BSKd), strict=True):
                old[:, :, start : start + s] = _by_head(new)
            return held
        index = (paddle.arange(b * heads) * room).reshape([b, heads, 1]) + self.rows.columns_BS.unsqueeze(1)
        for side, new in enumerate((k_BSKd, v_BSKd)):
            places, rows = held[side].reshape([-1, d]), _by_head(new).reshape([-1, d])
            if self.kept is None:
                flat = paddle.scatter_(places, index.reshape([-1]), rows)
            else:  # Paddle scatters no bytes on a CPU
                flat = paddle.index_put_(places, (index.reshape([-1]),), rows)
            held[side] = flat.reshape([b, heads, room, d])
        return held


def _by_head(x_BSKd: paddle.Tensor) -> paddle.Tensor:
    return x_BSKd.transpose([0, 2, 1, 3])


class KVCache:
    """The caches of all layers; `lengths` says how many tokens of each row are in them."""

    def __init__(self, layers: Sequence[Kept | None]) -> None:
        self.lengths = [0]
        self.room = 0
        self.layers = [LayerCache(self, kept) for kept in layers]

    def open(self, num_new: int) -> paddle.Tensor:
        """Make room for `num_new` tokens of every row; returns their columns, which are their positions: [B, S]."""
        needed = max(self.lengths) + num_new
        self.room = max(self.room, -(-needed // _CHUNK) * _CHUNK)
        self.columns_BS = paddle.to_tensor(self.lengths, dtype="int64").unsqueeze(1) + paddle.arange(num_new)
        self.visible_BST = self.columns_BS.unsqueeze(-1) >= paddle.arange(self.room)
        return self.columns_BS

    def close(self, num_new: int) -> None:
        """The opened tokens are in."""
        self.lengths = [length + num_new for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all rows but these."""
        index = paddle.to_tensor(list(rows), dtype="int64")
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.held = [paddle.gather(x, index, axis=0) for x in layer.held]

    def join(self, other: KVCache) -> None:
        """Take the rows of another cache in behind one's own."""
        self.lengths += other.lengths
        self.room = max(self.room, other.room)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            pairs = zip(mine.held, theirs.held, strict=True)
            mine.held = [paddle.concat([self._widened(x), self._widened(y)]) for x, y in pairs]

    def _widened(self, x_BKTd: paddle.Tensor) -> paddle.Tensor:
        b, heads, columns, d = x_BKTd.shape
        if columns == self.room:
            return x_BKTd
        return paddle.concat([x_BKTd, paddle.zeros([b, heads, self.room - columns, d], x_BKTd.dtype)], axis=2)
