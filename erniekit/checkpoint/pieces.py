"""What a rank holds of a model's tensors, as boxes of the model's atoms: the arithmetic of saving by many ranks and of
loading under another layout.

A rank has a part of every tensor (`config/cut.py`), its *block*. Of the block it may have a *span* only: the numbers
from one place to another with the block laid out flat, as sharding leaves them. An atom lies in the block under a view,
which has strides; which boxes of the atom a span is follows from these, whatever the view transposes, splits or fuses.
Knows no files and no other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.lib.stride_tricks import as_strided

from erniekit.checkpoint.ernie45 import Table
from erniekit.checkpoint.keys import View, assign

Box = tuple[slice, ...]
Span = tuple[int, int]  # from, to


def boxes(shape: Sequence[int], strides: Sequence[int], *, offset: int, span: Span) -> Iterator[Box]:
    """The elements of an array whose flat positions, `offset` plus indices times `strides`, lie within `span`, as few
    boxes of its indices. A step along an axis is longer than everything within it, as in slices of row-major arrays."""
    axes = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: -strides[axis])
    inner = [sum((shape[axis] - 1) * strides[axis] for axis in axes[depth:]) for depth in range(len(axes) + 1)]
    start, stop = span

    def within(depth: int, base: int, box: list[slice]) -> Iterator[Box]:
        if base >= stop or base + inner[depth] < start:
            return
        if start <= base and base + inner[depth] < stop:
            yield tuple(box)
            return
        axis = axes[depth]
        step, rest = strides[axis], inner[depth + 1]
        first = max(0, -((base - start) // step))  # of those that are wholly inside
        end = max(first, min(shape[axis], (stop - 1 - rest - base) // step + 1))
        if first < end:
            yield tuple(_with(box, axis, slice(first, end)))
        touched = range(max(0, -((base + rest - start) // step)), min(shape[axis], (stop - 1 - base) // step + 1))
        for i in touched:
            if not first <= i < end:
                yield from within(depth + 1, base + i * step, _with(box, axis, slice(i, i + 1)))

    if all(shape):
        yield from within(0, offset, [slice(0, length) for length in shape])


def _with(box: list[slice], axis: int, taken: slice) -> list[slice]:
    return [*box[:axis], taken, *box[axis + 1 :]]


@dataclass(frozen=True)
class Piece:
    """A box of a whole atom, as the atom's view shows it, and where the rank has it: in its numbers laid out flat."""

    box: Box
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def seen(self, numbers: np.ndarray) -> np.ndarray:
        """The piece as a view of the rank's numbers of the tensor."""
        flat = numbers.reshape(-1)
        assert np.may_share_memory(flat, numbers), "not laid out in rows"
        return as_strided(flat[self.offset :], self.shape, [step * flat.itemsize for step in self.strides])


@dataclass(frozen=True)
class Part:
    """A rank's part of every tensor: `table` says its blocks, `spans` what of a block it has (else all of it)."""

    table: Table
    spans: Mapping[str, Span] = field(default_factory=dict)

    def span(self, tensor: str) -> Span:
        """What the rank has of its block."""
        return self.spans.get(tensor, (0, int(np.prod(self.table.tensors[tensor].shape))))

    def pieces(self, atom: str) -> list[Piece]:
        """What the rank has of an atom; nothing if it has no part of it."""
        place = self.table.places.get(atom)
        return [] if place is None else self._pieces(atom, place.tensor, place.view)

    def filled(self, tensor: str, whole: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The rank's numbers of a tensor, out of whole atoms as their views show them."""
        start, stop = self.span(tensor)
        numbers = np.empty(stop - start, dtype)
        for atom, view in self.table.tensors[tensor].parts:
            for piece in self._pieces(atom, tensor, view):
                assign(piece.seen(numbers), whole[atom][piece.box])
        return numbers if tensor in self.spans else numbers.reshape(self.table.tensors[tensor].shape)

    def _pieces(self, atom: str, tensor: str, view: View) -> list[Piece]:
        shape, strides, offset = _geometry(view, self.table.tensors[tensor].shape)
        span, held = self.span(tensor), self.table.held.get(atom, ())
        starts = [part.start or 0 for part in held] + [0] * (len(shape) - len(held))
        found = []
        for box in boxes(shape, strides, offset=offset, span=span):
            at = offset + sum(taken.start * step for taken, step in zip(box, strides, strict=True))
            moved = tuple(slice(a + taken.start, a + taken.stop) for a, taken in zip(starts, box, strict=True))
            found.append(Piece(moved, at - span[0], tuple(t.stop - t.start for t in box), strides))
        return found


def _geometry(view: View, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset, in numbers, of a view of a tensor of `shape`; nothing of that size is made."""
    steps = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    tensor = as_strided(np.empty(1, np.uint8), shape, steps)
    seen = view(tensor)
    return seen.shape, seen.strides, seen.__array_interface__["data"][0] - tensor.__array_interface__["data"][0]
