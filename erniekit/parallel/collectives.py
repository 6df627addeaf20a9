"""What ranks can say to each other: the only file that calls Paddle's collectives.

A `Channel` connects the ranks of one group. NCCL has everything. Gloo, on CPUs, lacks reduce-scatter and all-to-all:
stand-ins are made of what it has, so the same program runs on a laptop, if not as fast. `Traffic` counts what is handed
to channels, in bytes that the algorithm needs, whatever a stand-in really moves.

Tensors are contiguous. `sum` and `max` are the reductions. Ranks count from 0 inside the group here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import paddle
from paddle.base import core
from paddle.distributed.communication.group import Group

from erniekit.parallel.pulse import Pulse

Reduction = Literal["sum", "max"]
_KINDS = {"sum": core.ReduceOp.SUM, "max": core.ReduceOp.MAX}
_NCCL_PATIENCE = 30 * 60 * 1000  # milliseconds, Paddle's own value


class Handle:
    """A collective under way. `wait` returns its result, which has no content before."""

    def __init__(self, result: paddle.Tensor, wait: Callable[[], Any] | None = None) -> None:
        self.result, self._wait = result, wait

    def wait(self) -> paddle.Tensor:
        """The result, once it is there."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self.result

    def then(self, more: Callable[[], None]) -> Handle:
        """This handle, with `more` to be done once the result is there; now, if it is."""
        if self._wait is None:
            more()
            return self

        def wait() -> None:
            self.wait()
            more()

        return Handle(self.result, wait)


class Channel(Protocol):
    """The collectives of one group; every member calls the same ones in the same order."""

    def all_reduce(self, tensor: paddle.Tensor, op: Reduction) -> Handle:
        """Reduce in place."""

    def all_gather(self, tensor: paddle.Tensor) -> Handle:
        """[n, ...] of every rank -> [ranks * n, ...] in rank order."""

    def reduce_scatter(self, tensor: paddle.Tensor) -> Handle:
        """Sum [ranks * n, ...]; every rank gets its [n, ...]."""

    def all_to_all(self, tensor: paddle.Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        """The first send[0] rows go to rank 0, the next send[1] to rank 1; what arrives lies in rank order."""

    def broadcast(self, tensor: paddle.Tensor, source: int) -> Handle:
        """What rank `source` holds, in place."""


class _Channel:
    """What both libraries have: tensors of one shape on all ranks, of which empty ones are not sent. Paddle's process
    groups are used as they are; paddle.distributed's functions would open a store of their own where ours listens."""

    def __init__(self, group: Any, *, waits: bool) -> None:
        self._group, self._waits = group, waits  # waits: a call returns when everything is finished

    def _handle(self, result: paddle.Tensor, task: Any) -> Handle:
        if not self._waits:
            return Handle(result, task.wait)
        task.wait()
        return Handle(result)

    def all_reduce(self, tensor: paddle.Tensor, op: Reduction) -> Handle:
        """See Channel."""
        if not tensor.size:
            return Handle(tensor)
        return self._handle(tensor, self._group.all_reduce(tensor, _KINDS[op], self._waits))

    def all_gather(self, tensor: paddle.Tensor) -> Handle:
        """See Channel."""
        out = paddle.empty([self._group.size() * tensor.shape[0], *tensor.shape[1:]], tensor.dtype)
        if not out.size:
            return Handle(out)
        return self._handle(out, self._group.all_gather_into_tensor(out, tensor, self._waits))

    def broadcast(self, tensor: paddle.Tensor, source: int) -> Handle:
        """See Channel."""
        if not tensor.size:
            return Handle(tensor)
        return self._handle(tensor, self._group.broadcast(tensor, source, self._waits))


class GlooChannel(_Channel):
    """Gloo, on CPUs: everything is finished when a call returns. It gives up after 30 seconds, which cannot be set."""

    def __init__(self, store: Any, ranks: Sequence[int], *, index: int, number: int) -> None:
        """`store` is a TCPStore that no other group uses: gloo's keys carry no name of the group."""
        super().__init__(core.ProcessGroupGloo.create(store, index, len(ranks), number), waits=True)
        self.index, self.size = index, len(ranks)

    def reduce_scatter(self, tensor: paddle.Tensor) -> Handle:
        """See Channel: an all-reduce of which a rank keeps its part."""
        whole = self.all_reduce(tensor.clone(), "sum").wait()
        size = tensor.shape[0] // self.size
        return Handle(whole[self.index * size : (self.index + 1) * size].clone())

    def all_to_all(self, tensor: paddle.Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        """See Channel: all rows go everywhere, padded to those of the rank that sends most."""
        counts = self.all_gather(paddle.to_tensor([list(send)], "int64")).wait().tolist()
        assert [row[self.index] for row in counts] == list(receive), "ranks disagree on what is sent"
        most = max(sum(row) for row in counts)
        padded = paddle.zeros([most, *tensor.shape[1:]], tensor.dtype)
        padded[: tensor.shape[0]] = tensor
        everything = self.all_gather(padded).wait()
        parts = []
        for rank, row in enumerate(counts):
            start = rank * most + sum(row[: self.index])
            parts.append(everything[start : start + row[self.index]])
        return Handle(paddle.concat(parts) if sum(receive) else tensor[:0].clone())


class NCCLChannel(_Channel):
    """NCCL, on GPUs: calls return at once, and `wait` makes the device's next work wait, not the host. Written after
    Paddle 3.3.1's own use of these groups and not run: no machine with several GPUs was at hand."""

    def __init__(self, store: Any, ranks: Sequence[int], *, index: int, number: int) -> None:
        """`ranks` of the world; `number` is the same on all of them, and another one for every group of a process."""
        core.CommContextManager.set_device_id(int(paddle.get_device().partition(":")[2]))
        group = core.ProcessGroupNCCL.create(  # type: ignore[attr-defined]  # not in the CPU build
            store, index, len(ranks), number, _NCCL_PATIENCE, 0, None
        )
        super().__init__(group, waits=False)
        self.size = len(ranks)
        self.group = Group(index, number, list(ranks), group, f"mesh_{number}")

    def reduce_scatter(self, tensor: paddle.Tensor) -> Handle:
        """See Channel."""
        out = paddle.empty([tensor.shape[0] // self.size, *tensor.shape[1:]], tensor.dtype)
        if not out.size:
            return Handle(out)
        return self._handle(out, self._group.reduce_scatter_tensor(out, tensor, _KINDS["sum"], self._waits))

    def all_to_all(self, tensor: paddle.Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        """See Channel."""
        out = paddle.empty([sum(receive), *tensor.shape[1:]], tensor.dtype)
        task = self._group.all_to_all_single(out, tensor, list(receive), list(send), self._waits)
        return self._handle(out, task)


@dataclass
class Traffic:
    """Bytes that this rank handed to collectives, by "axis/collective". An all-gather counts what a rank gives, the
    others what it passes in."""

    sent: Counter[str] = field(default_factory=Counter)

    def add(self, axis: str, collective: str, tensor: paddle.Tensor) -> None:
        """Count one call."""
        self.sent[f"{axis}/{collective}"] += tensor.size * tensor.element_size()


class Axis:
    """The group of ranks along one axis of a mesh, as one of them sees it. With one rank, nothing is sent: results are
    what went in, so that nobody has to ask whether there are others."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        *,
        index: int = 0,
        channel: Channel | None = None,
        traffic: Traffic | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        assert (channel is None) == (len(ranks) == 1), (name, ranks)
        self.name, self.ranks, self.index = name, tuple(ranks), index
        self._channel, self._traffic, self._pulse = channel, traffic or Traffic(), pulse or Pulse()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    @property
    def nccl_group(self) -> Any:
        """The group in Paddle's words, for a library that talks to the ranks by itself (deep_ep.py)."""
        assert isinstance(self._channel, NCCLChannel)
        return self._channel.group

    def all_reduce(self, tensor: paddle.Tensor, *, op: Reduction = "sum") -> paddle.Tensor:
        """The reduction over all ranks, in place."""
        return self.start_all_reduce(tensor, op=op).wait()

    def all_gather(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """[n, ...] of every rank, all of one shape -> [ranks * n, ...]."""
        return self.start_all_gather(tensor).wait()

    def gather_uneven(self, tensor: paddle.Tensor, sizes: Sequence[int]) -> paddle.Tensor:
        """[sizes[index], ...] of every rank -> [sum of sizes, ...]."""
        assert tensor.shape[0] == sizes[self.index], (tensor.shape, sizes, self.index)
        if self._channel is None:
            return tensor
        if len(set(sizes)) == 1:
            return self.all_gather(tensor)
        most = max(sizes)
        padded = paddle.zeros([most, *tensor.shape[1:]], tensor.dtype)
        padded[: tensor.shape[0]] = tensor
        found = self._started("all_gather", tensor, lambda channel: channel.all_gather(padded)).wait()
        return paddle.concat([found[i * most : i * most + size] for i, size in enumerate(sizes)])

    def reduce_scatter(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """The sum over all ranks of [ranks * n, ...], of which this rank gets its [n, ...]."""
        return self.start_reduce_scatter(tensor).wait()

    def all_to_all(self, tensor: paddle.Tensor, send: Sequence[int], receive: Sequence[int]) -> paddle.Tensor:
        """Rows to every rank, `send` and `receive` many; what arrives lies in rank order."""
        return self.start_all_to_all(tensor, send, receive).wait()

    def broadcast(self, tensor: paddle.Tensor, *, source: int = 0) -> paddle.Tensor:
        """What the rank with index `source` holds, in place."""
        return self._started("broadcast", tensor, lambda channel: channel.broadcast(tensor, source)).wait()

    def start_all_reduce(self, tensor: paddle.Tensor, *, op: Reduction = "sum") -> Handle:
        """`all_reduce`, not waited for."""
        return self._started("all_reduce", tensor, lambda channel: channel.all_reduce(tensor, op))

    def start_all_gather(self, tensor: paddle.Tensor) -> Handle:
        """`all_gather`, not waited for."""
        return self._started("all_gather", tensor, lambda channel: channel.all_gather(tensor))

    def start_reduce_scatter(self, tensor: paddle.Tensor) -> Handle:
        """`reduce_scatter`, not waited for."""
        assert tensor.shape[0] % self.size == 0, (tensor.shape, self.size)
        return self._started("reduce_scatter", tensor, lambda channel: channel.reduce_scatter(tensor))

    def start_all_to_all(self, tensor: paddle.Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        """`all_to_all`, not waited for."""
        assert len(send) == len(receive) == self.size and sum(send) == tensor.shape[0], (send, receive, tensor.shape)
        return self._started("all_to_all", tensor, lambda channel: channel.all_to_all(tensor, send, receive))

    def _started(self, kind: str, tensor: paddle.Tensor, call: Callable[[Channel], Handle]) -> Handle:
        """A collective that begins with `tensor`, counted and noted; with one rank, `tensor` itself."""
        if self._channel is None:
            return Handle(tensor)
        self._traffic.add(self.name, kind, tensor)
        number = self._pulse.enter(kind, self.name)
        handle = call(self._channel)
        return handle.then(lambda: self._pulse.leave(number))

    def shares(self, total: int) -> list[int]:
        """How many of `total` things each rank takes, as evenly as can be: the first ones take one more."""
        base, more = divmod(total, self.size)
        return [base + (rank < more) for rank in range(self.size)]

    def share(self, total: int) -> slice:
        """Which of `total` things this rank takes."""
        ends = [0, *itertools.accumulate(self.shares(total))]
        return slice(ends[self.index], ends[self.index + 1])
