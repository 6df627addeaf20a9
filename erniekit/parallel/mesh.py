"""The mesh: this rank's place among all ranks, and the groups that it talks to.

It is opened once and handed to whoever needs it. A mesh of one rank is an ordinary mesh whose axes have size 1.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field

import paddle

from erniekit.base import runtime
from erniekit.base.runtime import Place
from erniekit.config.layout import AXES, Coordinates, Layout
from erniekit.parallel.collectives import Axis, Channel, GlooChannel, NCCLChannel, Traffic
from erniekit.parallel.pulse import Pulse
from erniekit.parallel.store import Words, open_free_store, open_store


@dataclass(frozen=True)
class Mesh:
    """What a rank knows of the others."""

    layout: Layout
    rank: int
    words: Words
    axes: dict[str, Axis]
    traffic: Traffic = field(default_factory=Traffic)
    pulse: Pulse = field(default_factory=Pulse)

    @classmethod
    def single(cls) -> Mesh:
        """One rank and nobody else."""
        return cls(Layout(), 0, Words(None, rank=0, world=1), {name: Axis(name, [0]) for name in AXES})

    @property
    def coordinates(self) -> Coordinates:
        """Where this rank stands."""
        return self.layout.coordinates(self.rank)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0

    def axis(self, name: str) -> Axis:
        """The group along an axis (config/layout.py names them)."""
        return self.axes[name]

    def meet(self, name: str) -> None:
        """Go on when all ranks have come here, however long that takes (store.py)."""
        self.words.meet(name)

    def close(self) -> None:
        """The last word: nobody leaves before all are here, rank 0 last."""
        self.words.part()


def open_mesh(layout: Layout, place: Place, *, config: Mapping[str, str] = types.MappingProxyType({})) -> Mesh:
    """Connect this process with the others, each of which calls this with the same layout and config: groups could not
    be opened otherwise. Raises MeshError."""
    assert place.world == layout.world, (place, layout)
    if place.world == 1:
        return Mesh.single()
    runtime.tell_paddle_rank(place.rank, place.world)
    pulse, store = Pulse(place.pulse, rank=place.rank), open_store(place.master, rank=place.rank)
    words = Words(store, rank=place.rank, world=place.world, pulse=pulse)
    words.await_ranks()
    words.agree(
        "the config", config,
        way_out="Start all ranks with the same file, overrides and packages; where machines have copies, copy again.",
    )  # fmt: skip
    traffic = Traffic()
    channels: dict[tuple[int, ...], Channel | None] = {}  # axes may have groups in common
    axes = {}
    for name in AXES:
        for group in layout.groups(name):
            key, mine, number = tuple(group), place.rank in group, len(channels)
            if len(group) > 1 and key not in channels:
                channels[key] = _open_channel(group, place, words, number=number) if mine else None
            if mine:
                index, channel = group.index(place.rank), channels.get(key)
                axes[name] = Axis(name, group, index=index, channel=channel, traffic=traffic, pulse=pulse)
    words.meet("mesh")
    return Mesh(layout, place.rank, words, axes, traffic, pulse)


def _open_channel(group: list[int], place: Place, words: Words, *, number: int) -> Channel:
    """A channel with a store of its own, which its first rank opens and tells the others of."""
    index, key = group.index(place.rank), f"group/{number}"
    if index == 0:
        store, address = open_free_store(place.host)
        words.store.set(key, address)
    else:
        store = open_store(words.store.get(key).decode(), rank=index)
    on_gpu = paddle.device.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")
    return (NCCLChannel if on_gpu else GlooChannel)(store, group, index=index, number=number)
