"""Rows of documents as the arrays that a model takes. Knows nothing of how rows were chosen.

A document may be a tree: answers to one prompt share the computation of it. It lies in the row as the prompt without
its last token, then a branch for each answer: the prompt's last token and the answer without its last one, so that the
first token of every answer is asked for after the same context. A branch sees the prompt and itself, and its positions
go on where the prompt's stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from erniekit.data.chat import UNTRAINED

CHOSEN, REJECTED, MISMATCHED = "chosen", "rejected", "mismatched"  # what a branch is
NO_ANSWER = -1

ROW_MULTIPLE = 8  # rows are padded to a multiple of this


@dataclass(frozen=True)
class Preference:
    """What the branches of a tree are to each other.

    A pair has a chosen and a rejected answer. An answer that is judged by itself is a chosen one if it is desirable,
    else a rejected one, and beside it stands a mismatched one: what another sample answers, after this prompt. Branches
    of one kind are one answer: its turns, where the chat template shows past turns otherwise than it asks for them.
    """

    sample: int  # its number among the samples of all files
    branches: tuple[str, ...]
    score_delta: float = 1.0  # by how much the chosen answer is better

    @property
    def answers(self) -> tuple[str, ...]:
        """The kinds of the answers, in the order in which they are numbered."""
        return tuple(dict.fromkeys(self.branches))


@dataclass(frozen=True)
class Document:
    """One sample as tokens: for each position the id and the id to predict there. A tree has `parts`: the lengths of
    its prompt (perhaps 0) and of each branch."""

    name: str
    input_ids: np.ndarray
    labels: np.ndarray
    parts: tuple[int, ...] = ()
    preference: Preference | None = None

    def spans(self) -> list[tuple[int, int]]:
        """Where each part begins and ends; a document without parts is a single one."""
        ends = list(itertools.accumulate(self.parts or (len(self.input_ids),), initial=0))
        return list(itertools.pairwise(ends))


@dataclass(frozen=True)
class Row:
    """The documents that share a row; they don't see each other."""

    documents: tuple[Document, ...]

    @property
    def num_tokens(self) -> int:
        """Positions that are filled."""
        return sum(len(document.input_ids) for document in self.documents)


@dataclass
class Batch:
    """One micro-batch, arrays [B, S]. Positions count from 0 in every document; segment 0 is padding.

    Column j is seen by the rows j <= i < end_rows[j]. `answer_ids` numbers the answers of the whole batch, on every
    position of their branches; elsewhere it is NO_ANSWER.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    end_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32; empty: by the segments
    answer_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32; empty: there are none
    counts: bool = field(default=True, kw_only=True)  # False: only worked through, to keep step with other ranks

    def __post_init__(self) -> None:
        if not self.end_rows.size:
            self.end_rows = _ends_of_segments(self.segment_ids)
        if not self.answer_ids.size:
            self.answer_ids = np.full(self.segment_ids.shape, NO_ANSWER, np.int32)

    @property
    def num_trained(self) -> int:
        """How many positions count in the loss."""
        return int((self.labels != UNTRAINED).sum())

    @property
    def num_tokens(self) -> int:
        """How many positions are not padding."""
        return int((self.segment_ids != 0).sum())


@dataclass(kw_only=True)
class PreferenceBatch(Batch):
    """A micro-batch of trees. The arrays are [N], a value for each sample: the numbers of its answers (NO_ANSWER where
    it has none of the kind), by how much the chosen one is better, and its number among the samples of all files."""

    chosen: np.ndarray  # int64
    rejected: np.ndarray  # int64
    mismatched: np.ndarray  # int64
    score_delta: np.ndarray  # float32
    samples: np.ndarray  # int64
    names: tuple[str, ...]

    @property
    def num_answers(self) -> int:
        """Answers of all samples; they are numbered in the order in which they lie."""
        return int(self.answer_ids.max(initial=NO_ANSWER)) + 1

    @property
    def desirable(self) -> np.ndarray:
        """Of answers that are judged by themselves: whether they are good ones."""
        return self.chosen != NO_ANSWER

    @property
    def judged(self) -> np.ndarray:
        """Of answers that are judged by themselves: their numbers."""
        return np.maximum(self.chosen, self.rejected)


def _ends_of_segments(segment_ids: np.ndarray) -> np.ndarray:
    """Column bounds of packed documents: every column ends with its document, padding sees only itself."""
    width = segment_ids.shape[1]
    count = np.arange(1, width + 1, dtype=np.int32)
    is_last = np.ones(segment_ids.shape, bool)
    is_last[:, :-1] = segment_ids[:, 1:] != segment_ids[:, :-1]
    ends = np.where(is_last, count, np.int32(width))
    nearest = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return np.where(segment_ids == 0, count, nearest)


def make_batch(rows: Sequence[Row], *, pad_id: int, max_seq_len: int, counts: bool = True) -> Batch:
    """Lay documents one after another and pad to the longest row, rounded up but not above `max_seq_len`.

    A PreferenceBatch if the documents are trees.
    """
    longest = max(row.num_tokens for row in rows)
    assert longest <= max_seq_len, f"a row of {longest} tokens does not fit max_seq_len {max_seq_len}"
    width = min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, max_seq_len)
    shape = (len(rows), width)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, UNTRAINED, np.int64)
    position_ids, segment_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    end_rows = np.tile(np.arange(1, width + 1, dtype=np.int32), (len(rows), 1))
    answer_ids = np.full(shape, NO_ANSWER, np.int32)
    num_answers = 0
    for line, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row.documents, start=1):
            end = start + len(document.input_ids)
            input_ids[line, start:end] = document.input_ids
            labels[line, start:end] = document.labels
            segment_ids[line, start:end] = segment
            (_, shared), *branches = document.spans()
            position_ids[line, start : start + shared] = np.arange(shared)
            end_rows[line, start : start + shared] = end
            if preference := document.preference:
                for (first, last), kind in zip(branches, preference.branches, strict=True):
                    position_ids[line, start + first : start + last] = np.arange(shared, shared + last - first)
                    end_rows[line, start + first : start + last] = start + last
                    answer_ids[line, start + first : start + last] = num_answers + preference.answers.index(kind)
                num_answers += len(preference.answers)
            start = end
    arrays = (input_ids, labels, position_ids, segment_ids, end_rows, answer_ids)
    documents = [document for row in rows for document in row.documents]
    return _with_preferences(arrays, documents, counts=counts) if num_answers else Batch(*arrays, counts=counts)


def _with_preferences(arrays: Sequence[np.ndarray], documents: Sequence[Document], *, counts: bool) -> PreferenceBatch:
    numbers = {kind: np.full(len(documents), NO_ANSWER, np.int64) for kind in (CHOSEN, REJECTED, MISMATCHED)}
    found: list[Preference] = []
    number = itertools.count()
    for place, document in enumerate(documents):
        assert document.preference is not None, f"{document.name} is no tree, and lies among trees"
        found.append(document.preference)
        for kind in document.preference.answers:
            numbers[kind][place] = next(number)
    return PreferenceBatch(
        *arrays,
        **numbers,
        score_delta=np.array([preference.score_delta for preference in found], np.float32),
        samples=np.array([preference.sample for preference in found], np.int64),
        names=tuple(document.name for document in documents),
        counts=counts,
    )


def make_batches(rows: Sequence[Row], *, batch_size: int, pad_id: int, max_seq_len: int) -> Iterator[Batch]:
    """Micro-batches of `batch_size` rows in order; the last one may be short."""
    for start in range(0, len(rows), batch_size):
        yield make_batch(rows[start : start + batch_size], pad_id=pad_id, max_seq_len=max_seq_len)


def count_trained(batches: Iterable[Batch]) -> int:
    """The global count of trained tokens, by which the loss of a step is divided."""
    return sum(batch.num_trained for batch in batches)
