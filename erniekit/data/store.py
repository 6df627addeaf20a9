"""Tokenised samples on disk, read piece by piece: memory holds an index of 24 bytes a sample, 70 of a tree,
whatever their length.

One folder for each source, written once and never changed. The files are read, not mapped, so that pages of the
system's cache do not count as memory of the run. Knows nothing of order and of where folders are kept.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from erniekit.base.errors import DataError
from erniekit.base.files import atomic_write
from erniekit.data.batch import CHOSEN, REJECTED, Document, Preference, Row
from erniekit.data.tokenising import INDEX, TREES, Chunk

TOKENS, LABELS, ENTRIES, LEDGER = "tokens.bin", "labels.bin", "index.bin", "ledger.jsonl"
RECORDS, BRANCHES = "trees.bin", "branches.bin"  # empty where no sample is a tree
FACTS = "facts.json"
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class LedgerEntry:
    """A sample that is not trained on as it stands in the file."""

    name: str
    action: str  # dropped, truncated or split
    reason: str


def worst_first(entries: Iterable[LedgerEntry]) -> list[LedgerEntry]:
    """What was dropped before what was truncated, and that before what was split."""
    return sorted(entries, key=lambda entry: ("dropped", "truncated", "split").index(entry.action))


def write_ledger(path: str | Path, entries: Iterable[LedgerEntry]) -> None:
    """Write a JSON object a line for each entry."""
    atomic_write(path, b"".join(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in entries))


def write_source(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Write the samples of one source into an empty folder, chunk by chunk."""
    num_rows = 0
    unused: set[str] = set()
    hashes = {name: sha256() for name in (TOKENS, LABELS, ENTRIES, RECORDS, BRANCHES, LEDGER)}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in hashes}
        for chunk in chunks:
            notes = b"".join(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in chunk.ledger)
            trees = (chunk.trees.tobytes(), chunk.branches)
            contents = (chunk.tokens, chunk.labels, chunk.index.tobytes(), *trees, notes)
            for name, content in zip(hashes, contents, strict=True):
                files[name].write(content)
                hashes[name].update(content)
            num_rows += chunk.num_rows
            unused |= chunk.unused_keys
    files_hashes = {name: found.hexdigest() for name, found in hashes.items()}
    facts = {"num_rows": num_rows, "unused_keys": sorted(unused), "sha256": files_hashes}
    (folder / FACTS).write_bytes(orjson.dumps(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_source` noted about a folder."""
    return orjson.loads((folder / FACTS).read_bytes())


class SourceStore:
    """The samples of one source, in file order. The folder may be deleted while this is in use."""

    def __init__(self, folder: Path, *, name: str) -> None:
        """`name` is how messages call the source."""
        facts = read_facts(folder)
        self.name = name
        self.num_rows: int = facts["num_rows"]
        self.unused_keys: list[str] = facts["unused_keys"]
        self.index = np.fromfile(folder / ENTRIES, INDEX)
        self.trees = np.fromfile(folder / RECORDS, TREES)
        self._branches = np.fromfile(folder / BRANCHES, np.int32)
        self._last_branches = np.cumsum(self.trees["num_branches"], dtype=np.int64)
        content = [facts["sha256"][TOKENS], facts["sha256"][LABELS], sha256(self.index["length"].tobytes()).hexdigest()]
        if len(self.trees):
            content += [facts["sha256"][RECORDS], facts["sha256"][BRANCHES]]
        self.digest = " ".join(content)  # of tokens, targets and borders; where they stood doesn't count
        self._ends = np.concatenate([[0], np.cumsum(self.index["length"], dtype=np.int64)])
        self._ledger = [orjson.loads(line) for line in (folder / LEDGER).read_bytes().splitlines()]
        self._tokens, self._labels = (os.open(folder / file, os.O_RDONLY) for file in (TOKENS, LABELS))
        for descriptor in (self._tokens, self._labels):
            weakref.finalize(self, os.close, descriptor)

    @property
    def ledger(self) -> list[LedgerEntry]:
        """What did not get in whole."""
        return [LedgerEntry(f"{self.name}:{line}", action, reason) for line, action, reason in self._ledger]

    @property
    def groups(self) -> np.ndarray:
        """A number for each sample; those that say the same, or answer the same prompt, share it."""
        return self.trees["prompt_hash"] if len(self.trees) else self.index["hash"]

    @property
    def told(self) -> np.ndarray:
        """How many tokens of each sample tell it from others: of a tree the prompt and the first answer."""
        return self.trees["told"] if len(self.trees) else self.index["length"]

    def document(self, sample: int, *, number: int) -> Document:
        """One sample; `number` is its place among those of all files."""
        first, last = int(self._ends[sample]), int(self._ends[sample + 1])
        name = f"{self.name}:{self.index['line'][sample]}"
        tokens, labels = _read(self._tokens, first, last), _read(self._labels, first, last)
        if not len(self.trees):
            return Document(name, tokens, labels)
        tree = self.trees[sample]
        count, num_first, end = int(tree["num_branches"]), int(tree["num_first"]), int(self._last_branches[sample])
        parts = (int(tree["root"]), *self._branches[end - count : end].tolist())
        best = CHOSEN if tree["desirable"] else REJECTED
        kinds = (best,) * num_first + (REJECTED,) * (count - num_first)
        return Document(name, tokens, labels, parts, Preference(number, kinds, float(tree["score_delta"])))

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The tokens of all samples, as many samples at a time as make a block."""
        first = 0
        while first < len(self.index):
            last = int(np.searchsorted(self._ends, self._ends[first] + _BLOCK_TOKENS, side="right")) - 1
            last = max(last, first + 1)
            yield slice(first, last), _read(self._tokens, int(self._ends[first]), int(self._ends[last]))
            first = last


def _read(descriptor: int, first: int, last: int) -> np.ndarray:
    raw = os.pread(descriptor, 4 * (last - first), 4 * first)
    if len(raw) != 4 * (last - first):
        raise DataError("Tokenised data was cut off while it was in use. Run the same command again.")
    return np.frombuffer(raw, np.int32)


class SampleStore:
    """The samples of all sources, or some of them, numbered one source after another."""

    def __init__(self, sources: Sequence[SourceStore], chosen: Sequence[np.ndarray] | None = None) -> None:
        """`chosen` are the numbers of the samples of each source, in rising order; None: all of them."""
        self.sources = sources
        self.chosen = chosen or [np.arange(len(source.index)) for source in sources]
        self._ends = np.cumsum([0, *map(len, self.chosen)])

    @property
    def index(self) -> np.ndarray:
        """A record for each sample."""
        return np.concatenate(
            [source.index[chosen] for source, chosen in zip(self.sources, self.chosen, strict=True)]
        )

    @property
    def trees(self) -> np.ndarray:
        """A record for each sample, if they are trees."""
        return np.concatenate(
            [source.trees[chosen] for source, chosen in zip(self.sources, self.chosen, strict=True)]
        )

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return int(self._ends[-1])

    @property
    def num_tokens(self) -> int:
        """Positions of all samples."""
        return int(self.index["length"].sum(dtype=np.int64))

    @property
    def num_trained(self) -> int:
        """Positions that count in the loss."""
        return int(self.index["trained"].sum(dtype=np.int64))

    @property
    def source_sizes(self) -> tuple[int, ...]:
        """Number of samples of each source."""
        return tuple(map(len, self.chosen))

    @property
    def ledger(self) -> list[LedgerEntry]:
        """What did not get in whole, of all sources."""
        return [entry for source in self.sources for entry in source.ledger]

    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        return array("i", self.index["length"].tobytes())

    def document(self, sample: int) -> Document:
        """One sample."""
        source = int(np.searchsorted(self._ends, sample, side="right")) - 1
        return self.sources[source].document(int(self.chosen[source][sample - self._ends[source]]), number=sample)

    def name(self, sample: int) -> str:
        """Where a sample stands: file:line."""
        source = int(np.searchsorted(self._ends, sample, side="right")) - 1
        line = self.sources[source].index["line"][self.chosen[source][sample - self._ends[source]]]
        return f"{self.sources[source].name}:{line}"

    def lines(self, source: int) -> np.ndarray:
        """The lines of a source on which its samples stand."""
        return self.sources[source].index["line"][self.chosen[source]]

    def row(self, samples: Iterable[int]) -> Row:
        """A row of these samples."""
        return Row(tuple(self.document(int(sample)) for sample in samples))

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What samples say, a block of them at a time: how long each is, and their tokens one after another. Of a tree
        that is the prompt and the first answer."""
        for source, chosen in zip(self.sources, self.chosen, strict=True):
            is_chosen = np.zeros(len(source.index), bool)
            is_chosen[chosen] = True
            for span, tokens in source.blocks():
                lengths, told = source.index["length"][span], source.told[span] * is_chosen[span]
                place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
                yield told[is_chosen[span]], tokens[place < np.repeat(told, lengths)]

    def digest(self) -> str:
        """A hash over all tokens, targets, and borders of samples and sources."""
        content = sha256()
        for source, chosen in zip(self.sources, self.chosen, strict=True):
            content.update(f"{source.digest} {len(chosen)} ".encode())
            content.update(chosen.tobytes())
        return content.hexdigest()
