"""Rows of documents as the arrays that a model takes. Knows nothing of how rows were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from erniekit.data.chat import UNTRAINED

_MULTIPLE = 8  # rows are padded to a multiple of this


@dataclass(frozen=True)
class Document:
    """One sample as tokens: for each position the id and the id to predict there."""

    name: str
    input_ids: np.ndarray
    labels: np.ndarray


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
    """One micro-batch, int64 arrays [B, S]. Positions count from 0 in every document; segment 0 is padding."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray

    @property
    def num_trained(self) -> int:
        """How many positions count in the loss."""
        return int((self.labels != UNTRAINED).sum())

    @property
    def num_tokens(self) -> int:
        """How many positions are not padding."""
        return int((self.segment_ids != 0).sum())


def make_batch(rows: Sequence[Row], *, pad_id: int, max_seq_len: int) -> Batch:
    """Lay documents one after another and pad to the longest row, rounded up but not above `max_seq_len`."""
    longest = max(row.num_tokens for row in rows)
    assert longest <= max_seq_len, f"a row of {longest} tokens does not fit max_seq_len {max_seq_len}"
    width = min(-(-longest // _MULTIPLE) * _MULTIPLE, max_seq_len)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    labels = np.full((len(rows), width), UNTRAINED, np.int64)
    position_ids = np.zeros((len(rows), width), np.int64)
    segment_ids = np.zeros((len(rows), width), np.int64)
    for line, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row.documents, start=1):
            end = start + len(document.input_ids)
            input_ids[line, start:end] = document.input_ids
            labels[line, start:end] = document.labels
            position_ids[line, start:end] = np.arange(end - start)
            segment_ids[line, start:end] = segment
            start = end
    return Batch(input_ids, labels, position_ids, segment_ids)


def make_batches(rows: Sequence[Row], *, batch_size: int, pad_id: int, max_seq_len: int) -> Iterator[Batch]:
    """Micro-batches of `batch_size` rows in order; the last one may be short."""
    for start in range(0, len(rows), batch_size):
        yield make_batch(rows[start : start + batch_size], pad_id=pad_id, max_seq_len=max_seq_len)


def count_trained(batches: Iterable[Batch]) -> int:
    """The global count of trained tokens, by which the loss of a step is divided."""
    return sum(batch.num_trained for batch in batches)
