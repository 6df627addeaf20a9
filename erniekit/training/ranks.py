"""What one rank does for all, and what all must say alike before a run begins.

Whatever may take long on one rank, or fail there, ends in words on the store: there nobody runs out of patience.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import paddle

from erniekit.base.errors import ErnieKitError, MeshError
from erniekit.config.run import RunConfig
from erniekit.parallel.mesh import Mesh

T = TypeVar("T")


def first_alone(mesh: Mesh, name: str, work: Callable[[], T]) -> T | None:
    """Let rank 0 do `work` while the others wait, however long; what it returns, and None on the others.

    What rank 0 finds wrong ends all ranks: it raises it, and the others a MeshError with the same words, so that they
    are told once.
    """
    found, problems = None, list[str]()
    if mesh.first:
        try:
            with mesh.pulse.phase(name):
                found = work()
        except ErnieKitError as error:
            mesh.words.share(name, error.problems)
            mesh.close()
            raise
    if problems := mesh.words.share(name, problems):
        mesh.close()
        raise MeshError(problems)
    return found


def anybody(mesh: Mesh, *, does: bool) -> bool:
    """Whether one of the ranks does, which all ask at once: they go the same way from here."""
    return anybodys(mesh, [does])[0]


def anybodys(mesh: Mesh, facts: Sequence[bool]) -> list[bool]:
    """Of each of several facts, whether it is so on one of the ranks, which all ask at once."""
    world = mesh.axis("world")
    if world.size == 1:
        return list(facts)
    said = world.all_reduce(paddle.to_tensor([int(fact) for fact in facts], "int64"), op="max")
    return [bool(fact) for fact in said.tolist()]


def config_digest(cfg: RunConfig) -> str:
    """A hash of all keys."""
    return hashlib.sha256(json.dumps(cfg.flat(), sort_keys=True, default=str).encode()).hexdigest()


def require_same_config(mesh: Mesh, cfg: RunConfig) -> None:
    """Raise MeshError on all ranks if they do not all run the same config."""
    _agree(
        mesh, "the config", config_digest(cfg),
        way_out="Start all ranks with the same file and overrides; where machines have copies of it, copy it again.",
    )  # fmt: skip


def require_same_data(mesh: Mesh, fingerprint: str) -> None:
    """Raise MeshError on all ranks if they do not all read the same data."""
    _agree(
        mesh, "the content of the data", fingerprint,
        way_out="Ranks read the files of their own machine: copy them again, or put them on a shared disk.",
    )  # fmt: skip


def _agree(mesh: Mesh, what: str, digest: str, *, way_out: str) -> None:
    try:
        mesh.words.agree(what, digest, way_out=way_out)
    except MeshError:  # all have it: nobody leaves before all know
        mesh.close()
        raise
