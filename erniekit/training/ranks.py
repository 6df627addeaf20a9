"""What one rank does for all, and what all must say alike before a run begins.

Whatever may take long on one rank, or fail there, ends in words on the store: there nobody runs out of patience.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import paddle

from erniekit.base.errors import ErnieKitError, MeshError
from erniekit.checkpoint.adapter_folder import mark_of
from erniekit.checkpoint.folder import Folder
from erniekit.config.run import RunConfig
from erniekit.data.build import EvalData, TrainData
from erniekit.data.tokenizer import Tokenizer
from erniekit.parallel.mesh import Mesh
from erniekit.version import __version__

T = TypeVar("T")
_SHOWN = 12  # digits of a hash
_COPY_AGAIN = "Ranks read the files of their own machine: copy them again, or put them on a shared disk."


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


def facts_of(cfg: RunConfig) -> dict[str, str]:
    """What all ranks must have alike before they begin: the config and the program."""
    keys = {name: str(value) for name, value in cfg.flat().items()}
    return {**keys, "erniekit": __version__, "Paddle": paddle.__version__}


def require_same_model(mesh: Mesh, base: Folder, tokenizer: Tokenizer) -> None:
    """Raise MeshError on all ranks if they do not all begin with the same model, by a sample of every weight."""
    if mesh.layout.world == 1:
        return
    facts = {"tokenizer": tokenizer.digest(), "config.json": _digest(base.config_json), "weights": mark_of(base)}
    shown = {name: content[:_SHOWN] for name, content in facts.items()}
    mesh.words.agree("the model", shown, way_out=f"They are in {base.path}. {_COPY_AGAIN}")


def require_same_data(mesh: Mesh, data: TrainData | None, *held_out: EvalData | None) -> None:
    """Raise MeshError on all ranks if they do not all read the same data."""
    sources = [source for part in (data, *held_out) if part for source in part.store.sources]
    known = {
        f"file {number}, {Path(source.name).name},": _digest(source.digest.encode())[:_SHOWN]
        for number, source in enumerate(sources, start=1)
    }
    if data:
        known["the order of rows"] = data.fingerprint[:_SHOWN]
    mesh.words.agree("the content of the data", known, way_out=_COPY_AGAIN)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
