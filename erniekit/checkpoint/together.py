"""Files that many ranks write together: the bytes that one process would write, and no rank holds more than its part.

Rank 0 creates every file at its full size; every rank writes, through memory maps, the pieces that it has, converting
as one process does. Of ranks that hold the same piece one writes it, in turns. Then they share the hashing, and rank 0
moves the files into place. What fails on one rank fails on all. All ranks must see one file system, and see there what
the others wrote, page by page: a local disk, Lustre, GPFS and CephFS do; NFS does not promise it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from erniekit.base.errors import CheckpointError, ErnieKitError, MeshError
from erniekit.base.files import atomic_write, sha256, writing
from erniekit.checkpoint.ernie45 import Table
from erniekit.checkpoint.hf_files import Entry, SharedFile, create_safetensors, in_file_order
from erniekit.checkpoint.keys import assign
from erniekit.checkpoint.pieces import Part, Span
from erniekit.checkpoint.source import Source
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout

T = TypeVar("T")
_ASK_AGAIN = 0.01  # seconds
_SILENT = "silent"  # the note of a rank that cannot write what it has to say
_PATIENCE = 10  # seconds until what rank 0 made must be seen by the others; networks are slow to tell


class Words(Protocol):
    """How ranks talk (parallel/store.py)."""

    def share(self, name: str, value: Any = None) -> Any:
        """What rank 0 says."""

    def collect(self, name: str, value: Any) -> list[Any]:
        """What every rank says, in rank order."""

    def part(self) -> None:
        """Be heard by all before an error that all have ends this rank."""


class Team(Protocol):
    """The ranks that save together (parallel/mesh.py)."""

    @property
    def layout(self) -> Layout:
        """Which rank holds what."""

    @property
    def rank(self) -> int:
        """This one."""

    @property
    def words(self) -> Any:
        """How they talk, a `Words`."""


@dataclass(frozen=True)
class _Company:
    """A team that talks otherwise."""

    layout: Layout
    rank: int
    words: Any


@dataclass(frozen=True)
class Share:
    """What this rank brings: numbers of tensors by name, its block or what `part` says that it has of the block, which
    `fetch` gives; `mine` names those that it writes. `others` are atoms that it copies out of `also`."""

    part: Part
    fetch: Callable[[str], np.ndarray]
    mine: frozenset[str]
    also: Source | None = None
    others: frozenset[str] = frozenset()

    def write(self, atom: str, target: np.ndarray) -> None:
        """Write what is ours of an atom into its view in a file."""
        if self.also and atom in self.others:
            assign(target, self.also.read(atom))
            self.also.release(atom)
        place = self.part.table.places.get(atom)
        if place is None or place.tensor not in self.mine:
            return
        numbers = self.fetch(place.tensor)
        for piece in self.part.pieces(atom):
            assign(target[piece.box], piece.seen(numbers))


@dataclass(frozen=True)
class File:
    """A safetensors file to be written: its tensors, and the table that says which atoms lie in them."""

    entries: list[Entry]
    table: Table
    metadata: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------- who writes what
def share_of(
    team: Team, table_of: Callable[[Cut], Table], numbers: Mapping[str, np.ndarray], *,
    spans: Mapping[str, Span] | None = None,
) -> Share:  # fmt: skip
    """This rank's share of tensors that `table_of` lays out for a cut, and of which it may have `spans` only. All ranks
    of the team call it."""
    spans = spans or {}
    own, mine = assigned(team, table_of, spans=spans)
    # A stacked tensor is asked for once per expert, its two kinds in turn: the last few are kept.
    return Share(Part(own, spans), functools.lru_cache(maxsize=4)(numbers.__getitem__), mine)


def assigned(
    team: Team, table_of: Callable[[Cut], Table], *, spans: Mapping[str, Span]
) -> tuple[Table, frozenset[str]]:  # fmt: skip
    """This rank's table, and the tensors of which it writes what it has. All ranks of the team call it."""
    layout, rank = team.layout, team.rank
    said = team.words.collect("spans", {name: list(span) for name, span in spans.items()})
    tables: dict[tuple[int, int], Table] = {}  # ranks that differ on other axes have the same blocks
    everyones = []
    for other, at in enumerate(map(layout.coordinates, range(layout.world))):
        key = (at.tensor, at.expert)
        if key not in tables:
            tables[key] = table_of(Cut.of(layout, other))
        everyones.append(tables[key])
    own = everyones[rank]
    mine = set()
    for number, (name, tensor) in enumerate(own.tensors.items()):
        block, by_span = _block(own, name), dict[Span, list[int]]()
        for other, table in enumerate(everyones):
            if _block(table, name) == block:
                start, stop = said[other].get(name, (0, int(np.prod(tensor.shape))))
                by_span.setdefault((start, stop), []).append(other)
        _require_all(name, list(by_span), int(np.prod(tensor.shape)))
        for (start, stop), holders in by_span.items():
            if stop > start and holders[number % len(holders)] == rank:
                mine.add(name)
    return own, frozenset(mine)


def _block(table: Table, name: str) -> object:
    """What tells a rank's block of a tensor from another's: its first atom, and which part of that it is."""
    atom = table.tensors[name].parts[0][0]
    return atom, [(part.start, part.stop) for part in table.held.get(atom, ())]


def _require_all(name: str, spans: Sequence[Span], size: int) -> None:
    ends = [0]
    for start, stop in sorted(span for span in spans if span[1] > span[0]):
        assert start == ends[-1], f"{name}: the ranks hold {sorted(spans)} of {size} numbers"
        ends.append(stop)
    assert ends[-1] == size, f"{name}: the ranks hold {sorted(spans)} of {size} numbers"


# ---------------------------------------------------------------------- what all do
def together(notes: Notes, name: str, work: Callable[[], T]) -> list[T]:
    """What `work` returns on every rank, in rank order (JSON); all fail if one fails."""
    try:
        said: dict[str, Any] = {"found": work()}
    except ErnieKitError as error:
        said = {"problems": list(error.problems)}
    heard = notes.collect(name, said)
    problems = [problem for each in heard for problem in each.get("problems", ())]
    if problems:
        raise CheckpointError(list(dict.fromkeys(problems)))
    return [each["found"] for each in heard]


class Notes:
    """Words between ranks through files of a folder that all see: they can be said by a thread while the rank itself
    goes on, and cost less than the store where many ranks speak."""

    def __init__(self, folder: Path, *, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self._used: Counter[str] = Counter()

    def collect(self, name: str, value: Any) -> list[Any]:
        """What every rank says, in rank order, when all have said it."""
        self._used[name] += 1
        files = [f"{name}-{self._used[name]}.{rank}" for rank in range(self.world)]
        try:
            atomic_write(self.folder / files[self.rank], json.dumps(value).encode())
        except CheckpointError:  # a disk that has no room for words has it for an empty file
            with contextlib.suppress(OSError):
                (self.folder / f"{_SILENT}.{self.rank}").touch()
            raise
        try:
            while not set(files) <= (seen := set(os.listdir(self.folder))):
                if silent := sorted(int(file.partition(".")[2]) for file in seen if file.startswith(_SILENT)):
                    raise CheckpointError(f"{self.folder.parent}: rank {silent[0]} cannot write there.")
                time.sleep(_ASK_AGAIN)
            return [json.loads((self.folder / file).read_bytes()) for file in files]
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder.parent}: rank 0 has given it up.") from None

    def share(self, name: str, value: Any = None) -> Any:
        """What rank 0 says."""
        return self.collect(name, None if self.rank else value)[0]

    def part(self) -> None:
        """See Words: the notes stay until all have left."""

    def leave(self) -> None:
        """The last word. Rank 0 removes the folder when all have said it."""
        if self.rank:
            with writing(self.folder):
                (self.folder / f"left.{self.rank}").touch()
            return
        while len(list(self.folder.glob("left.*"))) < self.world - 1:
            time.sleep(_ASK_AGAIN)
        shutil.rmtree(self.folder)


class SharedStage:
    """A folder that rank 0 gets from `staged` and all ranks fill within a `with` block. Rank 0 puts it in its place
    when all have left the block well, and gives it up when one has not. Opening and settling talk over the team's
    words; the block itself talks by notes, and may be run by a thread."""

    def __init__(self, team: Team, staged: Callable[[], AbstractContextManager[Path]]) -> None:
        """Raises CheckpointError on all ranks if rank 0 cannot make it, MeshError if one cannot see it."""
        self._words: Words = team.words
        self._layout = team.layout
        self._held, self._problems = contextlib.ExitStack(), list[str]()
        path, name = "", f".notes-{secrets.token_hex(8)}"
        if team.rank == 0:
            try:
                path = str(self._held.enter_context(staged()))
                (Path(path) / name).mkdir()
            except ErnieKitError as error:
                self._problems = list(error.problems)
        path, name, problems = self._words.share("stage", [path, name, self._problems])
        if problems:
            self._words.part()
            raise CheckpointError(problems)
        self.path = Path(path)
        self.notes = Notes(self.path / name, rank=team.rank, world=team.layout.world)
        self._require_seen()

    @property
    def team(self) -> Team:
        """The ranks, talking by notes: what they make together within this folder."""
        return _Company(self._layout, self.notes.rank, self.notes)

    def _require_seen(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not (seen := self.notes.folder.is_dir()) and time.monotonic() < deadline:
            time.sleep(_ASK_AGAIN)
        blind = [str(rank) for rank, sees in enumerate(self._words.collect("sees", seen)) if not sees]
        if blind:
            error = MeshError(
                f"{self.path.parent}: rank {', '.join(blind)} cannot see the folder that rank 0 made there. All ranks "
                "write one checkpoint: choose an output_dir on a file system that all machines share."
            )
            self._held.__exit__(MeshError, error, None)
            self._words.part()
            raise error

    def __enter__(self) -> SharedStage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is not None and not isinstance(error, ErnieKitError):
            self._held.__exit__(kind, error, trace)
            return False
        mine = list(error.problems) if error else []
        try:
            self._problems = [problem for said in self.notes.collect("end", mine) for problem in said]
            self.notes.leave()
        except CheckpointError as silent:  # one rank, that cannot say so
            self._problems = [*mine, *silent.problems]
        try:
            if self._problems:
                failed = CheckpointError(list(dict.fromkeys(self._problems)))
                self._held.__exit__(CheckpointError, failed, None)
            else:
                self._held.close()
        except ErnieKitError as refused:
            self._problems = list(refused.problems)
        return True

    def settle(self) -> None:
        """After the block: raise on all ranks what went wrong in it or in putting the folder in its place."""
        problems = [problem for said in self._words.collect("placed", self._problems) for problem in said]
        if problems:
            self._words.part()
            raise CheckpointError(list(dict.fromkeys(problems)))

    @property
    def failed(self) -> bool:
        """After the block: whether `settle` is going to raise, as far as this rank knows."""
        return bool(self._problems)


def write_files(stage: SharedStage, files: Mapping[str, File], share: Share) -> dict[str, str]:
    """Write `files` below `stage`, where all ranks call this; returns their sha256, on every rank."""
    path, notes = stage.path, stage.notes

    def create() -> None:
        for name, file in files.items() if notes.rank == 0 else ():
            with writing(path / name):
                create_safetensors(path / name, file.entries, metadata=file.metadata)

    def write() -> None:
        for name, file in files.items():
            with writing(path / name):
                _write_pieces(path / name, file, share)

    def digest() -> dict[str, str]:
        return {name: sha256(path / name) for name in itertools.islice(files, notes.rank, None, notes.world)}

    together(notes, "created", create)
    together(notes, "pieces", write)
    return {name: each for found in together(notes, "digests", digest) for name, each in found.items()}


def _write_pieces(path: Path, file: File, share: Share) -> None:
    opened = SharedFile(path)
    for entry in in_file_order(file.entries):
        array = opened.array(entry.name)
        for atom, view in file.table.tensors[entry.name].parts:
            seen = view(array)
            assert np.may_share_memory(seen, array), atom
            share.write(atom, seen)
        opened.release(entry.name)
    opened.flush()
