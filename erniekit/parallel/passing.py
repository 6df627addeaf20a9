"""Collectives that gradients pass through, in pairs: what one does forward, its mirror does backward.

    copy_in         nothing              | sum over ranks       into slices of a matrix cut by columns
    reduce_out      sum over ranks       | nothing              out of slices of a matrix cut by rows
    split           own part of a dim    | gather the parts     a whole that every rank has -> parts
    join            gather the parts     | own part of a dim    parts -> a whole that every rank goes on with alike
    join_in         gather the parts     | sum, own part        parts -> a whole that feeds slices of a matrix
    split_out       sum, own part        | gather the parts     partial sums -> parts
    sum_over        sum over ranks       | sum over ranks       parts of a statistic -> a figure that every rank has
    exchange        rows to other ranks  | the same way back    tokens to experts and back

"Alike" is the point: after `join` and `reduce_out` every rank computes the same numbers and the same gradients, so that
these must not be added up. After `sum_over` every rank computes a share of the loss from the same figure: with n ranks
each has to take 1/n of it. On an axis of one rank all of them do nothing.
Parts are as even as can be (Axis.shares). Knows tensors and axes, no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from erniekit.models.moe import Wire
from erniekit.parallel.collectives import Axis, Handle


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """x; its gradient is the sum of the ranks' gradients."""
    return x if axis.size == 1 else _CopyIn.apply(x, axis)


def reduce_out(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' x; its gradient goes to every rank."""
    return x if axis.size == 1 else _ReduceOut.apply(x, axis)


def split(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """This rank's part of x along `dim`; backward, the whole gradient is gathered from all parts."""
    return x if axis.size == 1 else _Split.apply(x, axis, dim)


def join(x: Tensor, axis: Axis, *, dim: int, total: int) -> Tensor:
    """The whole of `total` along `dim` from all parts; backward, a rank takes its part of its own gradient."""
    return x if axis.size == 1 else _Join.apply(x, axis, dim, total)


def join_in(x: Tensor, axis: Axis, *, dim: int, total: int) -> Tensor:
    """The whole of `total` along `dim` from all parts; its gradient is the sum of the ranks', of which each has a
    part."""
    return x if axis.size == 1 else _JoinIn.apply(x, axis, dim, total)


def split_out(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of the ranks' x; backward, the whole gradient is gathered."""
    return x if axis.size == 1 else _SplitOut.apply(x, axis, dim)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' x, and of their gradients."""
    return x if axis.size == 1 else _SumOver.apply(x, axis)


def exchange(
    x: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int], wire: Wire | None = None
) -> Callable[[], Tensor]:  # fmt: skip
    """[sum of send, ...] -> [sum of receive, ...]: rows to every rank in order; gradients go the same way back.

    The rows are under way when this returns; what it returns waits for them. Backward as well: gradients set out when
    they reach the second half and are waited for in the first. With a `wire` the rows travel as bytes; gradients pass
    as if they had not.
    """
    if axis.size == 1:
        return lambda: x
    way = _Way(axis, tuple(send), tuple(receive), wire)
    coming = _Depart.apply(x, way)
    return lambda: _Arrive.apply(coming, way)


# ---------------------------------------------------------------------- what both directions are made of
def _summed(x: Tensor, axis: Axis) -> Tensor:
    return axis.all_reduce(x.detach().clone())


def _again(x: Tensor) -> Tensor:
    """x in the same memory: Paddle takes x itself for an update in place. (It makes no view of nothing.)"""
    return x.detach().view(x.shape) if x.size else x.detach().clone()


def _part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part; a copy, which can be kept without the whole."""
    here = axis.share(x.shape[dim])
    return x.detach().slice([dim], [here.start], [here.stop]).contiguous().clone()


def _turned(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.detach().transpose(order).contiguous()


def _orders(num_dims: int, dim: int) -> tuple[list[int], list[int]]:
    """The dimensions with `dim` in front, as collectives want it, and back."""
    front = [dim, *(d for d in range(num_dims) if d != dim)]
    return front, [front.index(d) for d in range(num_dims)]


def _whole(x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
    """All parts along `dim`."""
    front, back = _orders(x.ndim, dim)
    return _turned(axis.gather_uneven(_turned(x, front), axis.shares(total)), back)


def _summed_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of the sum."""
    total = x.shape[dim]
    if total % axis.size:
        return _part(_summed(x, axis), axis, dim)
    front, back = _orders(x.ndim, dim)
    return _turned(axis.reduce_scatter(_turned(x, front)), back)


class _CopyIn(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _again(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad, ctx.axis)


class _ReduceOut(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:  # noqa: ARG004 - a mirror needs no memory
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class _Split(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.facts = axis, dim, x.shape[dim]
        return _part(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        axis, dim, total = ctx.facts
        return _whole(grad, axis, dim, total)


class _Join(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
        ctx.facts = axis, dim
        return _whole(x, axis, dim, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _part(grad, *ctx.facts)


class _JoinIn(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, total: int) -> Tensor:
        ctx.facts = axis, dim
        return _whole(x, axis, dim, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed_part(grad, *ctx.facts)


class _SplitOut(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.facts = axis, dim, x.shape[dim]
        return _summed_part(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        axis, dim, total = ctx.facts
        return _whole(grad, axis, dim, total)


class _SumOver(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad, ctx.axis)


class _Way:
    """An exchange under way, from its first half to its second and, with gradients, back."""

    def __init__(self, axis: Axis, send: tuple[int, ...], receive: tuple[int, ...], wire: Wire | None) -> None:
        self.axis, self.wire, self._there, self._back = axis, wire, (send, receive), (receive, send)
        self._going: tuple[Tensor, Handle] | None = None  # what is sent has to live until it is

    def start(self, rows: Tensor, *, back: bool) -> Tensor:
        """Send rows there, or gradients back; what will hold the ones that arrive here."""
        assert self._going is None, "another exchange is under way"
        rows = rows.detach().contiguous()
        handle = self.axis.start_all_to_all(rows, *(self._back if back else self._there))
        self._going = rows, handle
        return handle.result

    def arrived(self) -> Tensor:
        """What was to arrive, once it is there."""
        assert self._going is not None, "nothing is under way"
        rows, self._going = self._going[1].wait(), None
        return _again(rows)


class _Depart(PyLayer):
    """The first half. Its output has no content before the second half has waited for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        coming = way.start(x if way.wire is None else way.wire.encode(x.detach()), back=False)
        return coming if way.wire is None else paddle.empty([1], x.dtype)  # bytes have no gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004 - it is what the way brings
        return ctx.way.arrived()


class _Arrive(PyLayer):
    """The second half."""

    @staticmethod
    def forward(ctx: Any, coming: Tensor, way: _Way) -> Tensor:
        ctx.way, rows = way, way.arrived()
        return rows if way.wire is None else way.wire.decode(rows).astype(coming.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.way.start(grad, back=True)
