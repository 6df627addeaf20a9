"""From a part of a file to arrays of tokens: the work that is shared among processes.

What comes out depends on the rows, the tokenizer and the `Rules` alone. Knows neither caches nor processes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from erniekit.base.errors import DataError
from erniekit.data.chat import NO_ROOM, UNTRAINED, Dialogue, Encoded, encode_samples
from erniekit.data.lines import Part
from erniekit.data.preferences import Answers, TreeRules, encode_trees
from erniekit.data.sources import RowReport, Sample, Source, read_samples
from erniekit.data.tokenizer import Tokenizer

INDEX = np.dtype([("length", "<i4"), ("trained", "<i4"), ("line", "<i8"), ("hash", "<u8")])
TREES = np.dtype(
    [
        ("told", "<i4"), ("first", "<i4"), ("num_branches", "<i4"), ("num_first", "<i4"), ("root", "<i4"),
        ("prompt_length", "<i4"), ("score_delta", "<f4"), ("desirable", "?"), ("prompt_hash", "<u8"),
    ]
)  # fmt: skip

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Rules:
    """What decides the tokens of a row, beside the tokenizer. `template` is the text of the chat template."""

    stage: str
    max_seq_len: int
    allow_special: bool
    template: str | None
    trees: TreeRules | None = None  # of stages that compare answers


@dataclass(frozen=True)
class Chunk:
    """Samples of a source, in its order, and what became of its other rows.

    `index` has a record for each sample; its `hash` is that of the whole row, the same for all pieces of a document; of
    a tree it is that of the prompt and the first answer, which have `told` tokens in the record that `trees` has of it.
    `branches` are the lengths of the branches of all trees, `first` is that of a tree's first one.
    """

    tokens: bytes
    labels: bytes
    index: np.ndarray
    ledger: list[tuple[int, str, str]]  # line, action, reason
    num_rows: int
    num_bytes: int
    unused_keys: set[str]
    trees: np.ndarray = field(default_factory=lambda: np.zeros(0, TREES))
    branches: bytes = b""


def tokenise(source: Source, part: Part | None, *, tokenizer: Tokenizer, rules: Rules) -> Iterator[Chunk]:
    """Read and encode the rows of a part of a file, or of all of it, a bounded number of tokens at a time."""
    report = RowReport()
    draft = _Draft()
    for sample in read_samples(source, report, stage=rules.stage, part=part):
        draft.add(sample, tokenizer, rules)
        if len(draft.tokens) > _CHUNK_TOKENS:
            yield draft.chunk(report)
            draft = _Draft()
    yield draft.chunk(report)


class _Draft:
    """A chunk that grows."""

    def __init__(self) -> None:
        self.tokens, self._labels = array("i"), array("i")
        self._index: list[tuple[int, int, int, int]] = []
        self._trees: list[tuple[Any, ...]] = []
        self._branches = array("i")
        self._ledger: list[tuple[int, str, str]] = []
        self._num_rows = self._num_bytes = 0

    def add(self, sample: Sample, tokenizer: Tokenizer, rules: Rules) -> None:
        """Encode a row."""
        self._num_rows += 1
        self._num_bytes += sample.num_bytes
        if isinstance(sample.content, Answers):
            self._add_trees(sample.content, sample.line, tokenizer, rules)
            return
        pieces, action, reason = _encode(sample.content, tokenizer=tokenizer, rules=rules)
        if action:
            self._ledger.append((sample.line, action, reason))
        start = len(self.tokens)
        for piece in pieces:
            self.tokens.frombytes(_packed(piece.input_ids))
            self._labels.frombytes(_packed(piece.labels))
        whole = _hash(memoryview(self.tokens)[start:])
        for piece in pieces:
            self._index.append((len(piece.input_ids), piece.num_trained, sample.line, whole))

    def _add_trees(self, content: Answers, line: int, tokenizer: Tokenizer, rules: Rules) -> None:
        assert rules.trees is not None, f"stage {rules.stage} compares no answers"
        trees, action, reason = encode_trees(
            content, tokenizer, rules.trees, template=rules.template, max_len=rules.max_seq_len,
            allow_special=rules.allow_special,
        )  # fmt: skip
        if action:
            self._ledger.append((line, action, reason))
        for tree in trees:
            tokens = _packed(tree.input_ids)
            self.tokens.frombytes(tokens)
            self._labels.frombytes(_packed(tree.labels))
            num_trained = len(tree.labels) - tree.labels.count(UNTRAINED)
            told = tree.root + sum(tree.branches[: tree.num_first])
            self._index.append((len(tree.input_ids), num_trained, line, _hash(tokens[: 4 * told])))
            facts = (told, tree.branches[0], len(tree.branches), *tree[3:])
            self._trees.append((*facts, _hash(tokens[: 4 * tree.prompt_length])))
            self._branches.extend(tree.branches)

    def chunk(self, report: RowReport) -> Chunk:
        """What was gathered, with the bad rows that were met meanwhile."""
        bad = [(int(name.rpartition(":")[2]), "dropped", reason) for name, reason in report.bad]
        report.bad.clear()
        return Chunk(
            self.tokens.tobytes(), self._labels.tobytes(), np.array(self._index, INDEX), sorted(self._ledger + bad),
            self._num_rows + len(bad), self._num_bytes, report.unused_keys, np.array(self._trees, TREES),
            self._branches.tobytes(),
        )  # fmt: skip


def _hash(tokens: bytes | memoryview) -> int:
    return int.from_bytes(blake2b(tokens, digest_size=8).digest(), "little")


def _packed(numbers: list[int]) -> bytes:
    """The numbers as int32; `array.extend` takes five times as long."""
    return struct.pack(f"{len(numbers)}i", *numbers)


def _encode(content: Dialogue | str, *, tokenizer: Tokenizer, rules: Rules) -> tuple[list[Encoded], str, str]:
    """The samples that a row becomes, and what happened to it: an action of the ledger and the reason, or nothing."""
    max_len, allow_special = rules.max_seq_len, rules.allow_special
    if isinstance(content, str):
        ids = tokenizer.encode(content, allow_special=allow_special)
        labels = [*ids[1:], tokenizer.eos_id]
        starts = range(0, len(ids), max_len)
        pieces = [Encoded(ids[start : start + max_len], labels[start : start + max_len]) for start in starts]
        if len(pieces) == 1:
            return pieces, "", ""
        return pieces, "split", f"{len(ids)} tokens in {len(pieces)} pieces"
    if not any(content.trained):
        return [], "dropped", "no turn has label 1"
    try:
        encoded = encode_samples(
            tokenizer, content, template=rules.template, max_len=max_len, allow_special=allow_special
        )
    except DataError as error:
        return [], "dropped", str(error)
    samples = [sample for sample in encoded if sample.num_trained]
    lost = next((sample.shortened for sample in encoded if sample.shortened), "")
    if not samples:
        return [], "dropped", f"{NO_ROOM}{lost}"
    if lost:
        return samples, "truncated", lost
    several = f"{len(samples)} samples: the chat template shows past answers otherwise than it asks for them"
    return samples, *(("split", several) if len(samples) > 1 else ("", ""))
