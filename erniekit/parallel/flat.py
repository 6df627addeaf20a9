"""Parameters laid end to end: which of their numbers are whose. Arithmetic over names and sizes; talks to nobody.

A flat is reduced, updated and gathered as one. What its members have in common is their `Kind`. Padded to a multiple of
the ranks that share it, it falls into equal ranges, one for each; a range may begin and end within a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import paddle

from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import Layout
from erniekit.parallel.styles import holders, is_of_routed_experts, partial_over_tensor


@dataclass(frozen=True)
class Block:
    """How a parameter lies along the tensor axis: a rank holds number `index` of `total` blocks of it, the same ones as
    the consecutive ranks of that index. `partial`: each of these has only a part of the gradient's sum."""

    index: int = 0
    total: int = 1
    partial: bool = False


def blocks_of(names: Iterable[str], layout: Layout, arch: ErnieConfig, *, tensor: int) -> dict[str, Block]:
    """How parameters lie along the tensor axis, for the rank with index `tensor` on it (styles.py says)."""
    found, partial = {}, set(partial_over_tensor(names := list(names), layout, arch))
    for name in names:
        groups = holders(name, layout, arch)
        index = next(number for number, ranks in enumerate(groups) if tensor in ranks)
        found[name] = Block(index, len(groups), name in partial)
    return found


@dataclass(frozen=True)
class Kind:
    """What the members of a flat have in common."""

    experts: bool
    block: Block
    dtype: str
    trained: bool

    @classmethod
    def of(cls, name: str, p: paddle.Tensor, *, block: Block) -> Kind:
        """The kind of a parameter."""
        dtype = str(p.dtype).removeprefix("paddle.")
        return cls(is_of_routed_experts(name), block, dtype, not p.stop_gradient)

    @property
    def data(self) -> str:
        """The axis of ranks that hold the same numbers and see other rows."""
        return "expert_copies" if self.experts else "data"

    @property
    def shard(self) -> str:
        """The part of it along which optimizer states are shared."""
        return "expert_shard" if self.experts else "shard"

    @property
    def replica(self) -> str:
        """The other part."""
        return "expert_replica" if self.experts else "replica"


@dataclass(frozen=True)
class Range:
    """Which numbers of a parameter, [start, stop) of its flattened block, and where they lie in the rank's own range of
    the flat."""

    start: int
    stop: int
    place: int


class Flat:
    """The places of some parameters of one kind, for `shards` ranks that share them."""

    def __init__(self, kind: Kind, sizes: Mapping[str, int], *, shards: int) -> None:
        self.kind, self.sizes, self.shards = kind, dict(sizes), shards
        self.starts, end = dict[str, int](), 0
        for name, size in sizes.items():
            self.starts[name] = end
            end += size
        self.each = -(-end // shards)
        self.padding = self.each * shards - end

    def own(self, name: str, shard: int) -> Range:
        """What rank number `shard` has of a parameter; start == stop if that is nothing."""
        first, size = self.starts[name], self.sizes[name]
        begin, end = shard * self.each, (shard + 1) * self.each
        start = min(max(begin - first, 0), size)
        return Range(start, min(max(end - first, start), size), max(first - begin, 0))


def lay_flat(
    parameters: Mapping[str, paddle.Tensor], layout: Layout, *,
    blocks: Mapping[str, Block], most: int, together: Iterable[Sequence[str]] = (),
) -> list[Flat]:  # fmt: skip
    """Flats over all parameters, in about the order in which a backward pass finishes their gradients: the last ones
    first. Each has at most `most` numbers or one parameter; the names of each of `together` keep to themselves, and
    have one flat of each kind."""
    unit = {name: number for number, names in enumerate(together) for name in names}
    flats: list[tuple[Kind, dict[str, int]]] = []
    open_ones: dict[tuple[Kind, int], dict[str, int]] = {}
    for name, p in reversed(list(parameters.items())):
        kind, own = Kind.of(name, p, block=blocks.get(name, Block())), unit.get(name, -1)
        sizes = open_ones.get((kind, own))
        if sizes is None or (own < 0 and sum(sizes.values()) + p.size > most):
            sizes = open_ones[kind, own] = {}
            flats.append((kind, sizes))
        sizes[name] = p.size
    order = {name: number for number, name in enumerate(reversed(list(parameters)))}
    flats.sort(key=lambda flat: max(order[name] for name in flat[1]))  # by the gradient that comes last
    return [Flat(kind, sizes, shards=_shards(kind, layout)) for kind, sizes in flats]


def _shards(kind: Kind, layout: Layout) -> int:
    """Over how many ranks a flat of `kind` is cut."""
    return len(layout.groups(kind.shard)[0]) if layout.stage else 1
