"""Gradients summed over ranks, and optimizer states, gradients and weights that ranks share (ZeRO, arXiv 1910.02054).

Losses are divided by totals over all ranks, so every reduction is a sum. Parameters lie end to end in flats (flat.py)
of a few megabytes. When the last gradient of a flat is there, its reduction starts, beside the rest of the backward
pass; flats start in the same order on every rank, whatever order gradients come in. What happens to a flat:

    stage 0   all-reduce over all ranks that hold the same numbers; each of them makes the whole update
    stage 1   reduce-scatter over the ranks that share states, all-reduce of the own range over their replicas; each
              updates its own range, then weights are gathered
    stage 2   the same after every micro-batch: beyond a flat or two, no more of a gradient is kept than the own range,
              where micro-batches are added up in fp32
    stage 3   the same, and weights live as own ranges too (layered.py)

Before stage 2, micro-batches are added up where they are made: accumulation costs no traffic. Parameters that no other
rank has a share in stay out of all this: their gradient is where Paddle puts it. On one rank those are all.

Gradients that are partial along the tensor axis (norms under sequence parallelism, key heads that several ranks hold)
are summed along it, too. Knows names, sizes and axes, no model and no optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import paddle

from erniekit.config.parallel import FLAT_BYTES
from erniekit.parallel.collectives import Handle
from erniekit.parallel.flat import Block, Flat, Range, lay_flat
from erniekit.parallel.layered import LayerShards
from erniekit.parallel.mesh import Mesh


class _Bucket:
    """A flat on its way through a step."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.missing = set(self.flat.sizes)  # without a gradient in the round of reductions that is under way
        self.present: set[str] = set()  # had a gradient in this step
        self.coming: Handle | None = None
        self.sum: paddle.Tensor | None = None  # fp32: the own range, added up; at stage 0, the whole flat
        self.final = False  # whether what is coming is the last there is in this step
        self.complete = False  # whether all ranks are in the sum


class GradientSync:
    """Gradients of a step, summed over ranks: `expect` before every backward pass, `finish` after the last one."""

    def __init__(
        self, parameters: Mapping[str, paddle.Tensor], mesh: Mesh, *, blocks: Mapping[str, Block] | None = None,
        flat_bytes: int = FLAT_BYTES, layers: LayerShards | None = None,
    ) -> None:  # fmt: skip
        """`parameters` are those that are trained, by name; `blocks` tells of those that are not replicated along the
        tensor axis; `layers` hold what lives as own ranges (stage 3)."""
        self._parameters, self._mesh, self._blocks = dict(parameters), mesh, blocks or {}
        self._early, self._layers = mesh.layout.stage >= 2, layers
        together = layers.names if layers else ()
        flats = lay_flat(parameters, mesh.layout, blocks=self._blocks, most=flat_bytes // 4, together=together)
        self.flats = [flat for flat in flats if self._shared(flat)]
        self._buckets = [_Bucket(flat) for flat in self.flats]
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.flat.sizes}
        self._turn = 0  # the bucket that starts next
        self._rounds = self._due = 0  # of reductions over all buckets in this step: taken, and to be taken
        self._last = False
        for name, p in self._parameters.items():
            if name in self._bucket_of:
                p._register_backward_hook(self._arrival(name))

    def _shared(self, flat: Flat) -> bool:
        kind, mesh = flat.kind, self._mesh
        return mesh.axis(kind.data).size > 1 or (kind.block.partial and mesh.axis("tensor").size > 1)

    # ------------------------------------------------------------------ a step

    def expect(self, *, last: bool) -> None:
        """A backward pass comes; with `last`, it is the step's last one."""
        if self._early:
            self._catch_up()
        self._due += self._early or last
        self._last = last

    def finish(self) -> None:
        """All gradients of the step are there. Without `expect`, one pass was made, or several that add up."""
        self._due = max(self._due, self._rounds, 1)
        self._catch_up()
        self._settle(self._buckets)
        for bucket in self._buckets:
            self._complete(bucket)
        if self._layers:
            self._layers.close()

    def clear(self) -> None:
        """Forget the gradients and free their memory."""
        for bucket in self._buckets:
            if bucket.coming is not None:
                bucket.coming.wait()
            bucket.forget()
        for p in self._parameters.values():
            p.clear_gradient(False)  # frees the memory; True would fill it with zeros
        self._turn = self._rounds = self._due = 0
        self._last = False

    def _arrival(self, name: str) -> Callable[[], None]:
        def arrived() -> None:
            if not (self._early or self._last):
                return
            self._bucket_of[name].missing.discard(name)
            while not self._buckets[self._turn].missing:
                self._start()

        return arrived

    def _catch_up(self) -> None:
        """Start what a pass left behind because some of its parameters had no gradient."""
        while self._buckets and self._rounds < self._due:
            self._start()

    def _start(self) -> None:
        """Begin to reduce the next bucket; its gradients' own memory is freed."""
        bucket = self._buckets[self._turn]
        self._settle(self._buckets[self._turn - 1 : self._turn] if self._turn else self._buckets[-1:])
        whole = self._collected(bucket)
        bucket.missing = set(bucket.flat.sizes)
        bucket.final = self._last and self._rounds == self._due - 1
        kind = bucket.flat.kind
        if self._mesh.layout.stage:
            bucket.coming = self._mesh.axis(kind.shard).start_reduce_scatter(whole)
        else:
            bucket.coming = self._mesh.axis(kind.data).start_all_reduce(whole)
        self._turn = (self._turn + 1) % len(self._buckets)
        self._rounds += self._turn == 0

    @paddle.no_grad()
    def _collected(self, bucket: _Bucket) -> paddle.Tensor:
        parts = []
        for name, size in bucket.flat.sizes.items():
            p = self._parameters[name]
            if p.grad is None:
                parts.append(paddle.zeros([size], "float32"))
                continue
            bucket.present.add(name)
            parts.append(p.grad.detach().reshape([-1]).astype("float32"))
            p.clear_gradient(False)
        parts.append(paddle.zeros([bucket.flat.padding], "float32"))
        return paddle.concat(parts)

    @paddle.no_grad()
    def _settle(self, buckets: Sequence[_Bucket]) -> None:
        """Take in what has been reduced."""
        for bucket in buckets:
            if bucket.coming is None:
                continue
            arrived, bucket.coming = bucket.coming.wait(), None
            bucket.sum = arrived if bucket.sum is None else bucket.sum.add_(arrived)
            if bucket.final:
                self._complete(bucket)

    def _complete(self, bucket: _Bucket) -> None:
        """The sum over the other axes: replicas, and ranks along the tensor axis that hold parts of the sum."""
        if bucket.complete or bucket.sum is None:
            return
        kind, bucket.complete = bucket.flat.kind, True
        if self._mesh.layout.stage:
            bucket.sum = self._mesh.axis(kind.replica).all_reduce(bucket.sum)
        if kind.block.partial:
            bucket.sum = self._over_tensor(bucket.sum, kind.block)

    def _over_tensor(self, mine: paddle.Tensor, block: Block) -> paddle.Tensor:
        """The sum over the ranks that hold the same block. Where these are not all, it is about a few key heads: they
        need no group of their own."""
        axis = self._mesh.axis("tensor")
        if block.total == 1:
            return axis.all_reduce(mine)
        copies = axis.size // block.total
        first = block.index * copies
        return axis.all_gather(mine.unsqueeze(0))[first : first + copies].sum(0)

    # ------------------------------------------------------------------ what a rank has of it

    def own(self, name: str) -> Range:
        """Which numbers of a parameter's block this rank updates."""
        bucket = self._bucket_of.get(name)
        if bucket is None:
            return Range(0, self._parameters[name].size, 0)
        return bucket.flat.own(name, self._mesh.axis(bucket.flat.kind.shard).index)

    def is_whole(self, name: str) -> bool:
        """Whether this rank updates all of the parameter's block."""
        return name not in self._bucket_of or self._bucket_of[name].flat.shards == 1

    def is_first(self, name: str) -> bool:
        """Whether this rank is the first of those that hold the same numbers of a parameter's own range."""
        mesh, block = self._mesh, self._blocks.get(name, Block())
        bucket = self._bucket_of.get(name)
        copies = mesh.axis("tensor").size // block.total
        if mesh.axis("tensor").index % copies:
            return False
        if bucket is None:
            return True
        kind = bucket.flat.kind
        return mesh.axis(kind.replica if mesh.layout.stage else kind.data).index == 0

    def gradient(self, name: str) -> paddle.Tensor | None:
        """The gradient of the own range, in the shape of the parameter if that is all of it; None if there is none."""
        p, bucket = self._parameters[name], self._bucket_of.get(name)
        if bucket is None:
            return p.grad
        if bucket.sum is None:
            return None
        own = self.own(name)
        numbers = bucket.sum[own.place : own.place + own.stop - own.start]
        return numbers.reshape(p.shape) if self.is_whole(name) else numbers

    def squares(self, names: Sequence[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
        """By name, the squared 2-norm of the gradient of all ranks, each number once, and on how many ranks it was
        there: two tensors [names]."""
        zero = paddle.zeros([1])
        squares, present = [], []
        for name in names:
            gradient, bucket = self.gradient(name), self._bucket_of.get(name)
            there = gradient is not None if bucket is None else name in bucket.present
            counts = gradient is not None and gradient.size and self.is_first(name)
            squares.append(_square(gradient) if counts else zero)
            present.append(float(there))
        found = paddle.concat([*squares, paddle.to_tensor(present, "float32")])
        found = self._mesh.axis("world").all_reduce(found)
        return found[: len(squares)], found[len(squares) :]

    # ------------------------------------------------------------------ weights

    @property
    def names(self) -> list[str]:
        """What is trained."""
        return list(self._parameters)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within, all weights are whole, and what is put in their place is kept."""
        return self._layers.whole() if self._layers else contextlib.nullcontext()

    def ranges(self) -> dict[str, tuple[paddle.Tensor, tuple[int, int]]]:
        """Of weights that live as own ranges, trained or not: the range, and which numbers of the weight it is."""
        return self._layers.ranges() if self._layers else {}

    def weight(self, name: str) -> paddle.Tensor:
        """The parameter's own range, which is updated in place."""
        p = self._parameters[name]
        if self._layers and name in self._layers:
            return self._layers.own(name)
        if self.is_whole(name):
            return p
        own = self.own(name)
        return p.detach().reshape([-1])[own.start : own.stop]

    @paddle.no_grad()
    def gather_weights(self) -> None:
        """Give every rank the ranges that the others have updated."""
        before: tuple[Flat, Handle] | None = None
        for flat in self.flats:
            if flat.shards == 1 or (self._layers and next(iter(flat.sizes)) in self._layers):
                continue  # nobody has another part; or it is gathered when it is needed
            parts = [self.weight(name) for name in flat.sizes]
            parts = [part.reshape([-1]) for part in parts]
            missing = flat.each - sum(part.shape[0] for part in parts)
            own = paddle.concat([*parts, paddle.zeros([missing], flat.kind.dtype)])
            coming = (flat, self._mesh.axis(flat.kind.shard).start_all_gather(own))
            self._put(before)
            before = coming
        self._put(before)

    def _put(self, coming: tuple[Flat, Handle] | None) -> None:
        if coming is None:
            return
        flat, whole = coming[0], coming[1].wait()
        for name, start in flat.starts.items():
            p = self._parameters[name]
            paddle.assign(whole[start : start + p.size].reshape(p.shape), p)


def _square(gradient: paddle.Tensor) -> paddle.Tensor:
    """The squared 2-norm, [1]."""
    return paddle._C_ops.squared_l2_norm(gradient.astype("float32"))
