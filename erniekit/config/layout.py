"""Which rank holds what: the axes of a run on many devices, as plain arithmetic. Talks to nobody.

Ranks are counted with the tensor axis innermost: rank = data index * tensor + tensor index. The data axis is cut into
replicas of `sharding` consecutive ranks that share gradients, optimizer states or weights. Experts are shared by the
tensor ranks, or by `expert` consecutive data ranks with the same tensor index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from erniekit.base.errors import MeshError
from erniekit.config.fp8 import fp8_misfits
from erniekit.config.layout_rules import degrees_of, model_misfits, optimizer_misfits, world_misfits

if TYPE_CHECKING:
    from erniekit.config.architecture import ErnieConfig
    from erniekit.config.run import RunConfig

Stage = Literal[0, 1, 2, 3]

AXES = ("world", "tensor", "data", "shard", "replica", "expert", "expert_copies", "expert_shard", "expert_replica")


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on every axis."""

    tensor: int
    data: int
    shard: int  # within its replica of the data axis
    replica: int
    expert: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. Degrees that do not fit each other are our mistake here: layout_of tells users."""

    world: int = 1
    tensor: int = 1
    expert: int = 1
    sharding: int = 1
    stage: Stage = 0  # what is sharded: nothing, states, gradients too, weights too
    experts_over: Literal["data", "tensor"] = "data"
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        assert self.world % self.tensor == 0, self
        assert self.data % self.sharding == 0, self
        if self.experts_over == "tensor":
            assert self.expert == self.tensor, self
        else:
            assert self.data % self.expert == 0, self
            assert self.expert % self.sharding == 0 or self.sharding % self.expert == 0, self

    @property
    def data(self) -> int:
        """Ranks that see different rows."""
        return self.world // self.tensor

    @property
    def replicas(self) -> int:
        """How often the data axis holds a whole set of shards."""
        return self.data // self.sharding

    @property
    def experts_over_data(self) -> int:
        """Data ranks that share the experts: 1 unless experts are shared along the data axis."""
        return self.expert if self.experts_over == "data" else 1

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands."""
        data, tensor = divmod(rank, self.tensor)
        replica, shard = divmod(data, self.sharding)
        expert = tensor if self.experts_over == "tensor" else data % self.expert
        return Coordinates(tensor, data, shard, replica, expert)

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks along an axis; together they are all ranks, each once.

        world: everybody. tensor: slices of one matrix. data: other rows. shard, replica: the data axis in its two
        parts. expert: who exchanges tokens. expert_copies: who holds the same experts (and the same tensor slice),
        and in its two parts, as for dense weights, expert_shard and expert_replica.
        """
        assert axis in AXES, axis
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            found.setdefault(self._key(axis, self.coordinates(rank)), []).append(rank)
        return list(found.values())

    def _key(self, axis: str, at: Coordinates) -> tuple[int, ...]:
        """What all ranks of a group have in common."""
        over = self.experts_over_data
        held = at.data % over  # which of the experts a rank holds, where data ranks share them
        if axis == "world":
            return ()
        if axis == "tensor" or (axis == "expert" and self.experts_over == "tensor"):
            return (at.data,)
        return {
            "data": (at.tensor,),
            "shard": (at.tensor, at.replica),
            "replica": (at.tensor, at.shard),
            "expert": (at.tensor, at.data // over),
            "expert_copies": (at.tensor, held),
            "expert_shard": (at.tensor, at.replica, held),
            "expert_replica": (at.tensor, at.shard // over, held),
        }[axis]


def layout_of(
    cfg: RunConfig, world: int, arch: ErnieConfig | None = None, *, verb: str = "train", cards: int = 0
) -> Layout:
    """The layout that the keys of a run ask for on `world` ranks; what they leave open is derived here and written back
    nowhere. Nothing is sharded but by `train`. Raises MeshError with everything that does not fit; of a model that is
    not known yet, nothing is said. `cards`: the GPUs of this machine, for the way out.
    """
    problems = list(world_misfits(cfg, world, verb=verb, cards=cards))
    asked = degrees_of(cfg, sparse=arch is None or arch.is_moe, verb=verb)
    data = max(world // asked.tensor, 1)
    sharding = asked.sharding or data
    if verb == "train":
        problems += optimizer_misfits(cfg, sharding)
    if arch is not None:
        problems += model_misfits(cfg, arch, data)
        if verb == "train":
            problems += fp8_misfits(cfg, arch, asked)
    if problems:
        raise MeshError(problems)
    return Layout(
        world=world,
        tensor=asked.tensor,
        expert=asked.tensor if asked.experts_over_tensor else asked.expert or data,
        sharding=sharding,
        stage=cast(Stage, asked.stage if sharding > 1 else 0),
        experts_over="tensor" if asked.experts_over_tensor else "data",
        sequence_parallel=cfg.parallel.sequence_parallel and asked.tensor > 1,
    )
