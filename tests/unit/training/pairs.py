"""Preference batches for a micro model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from erniekit.data.batch import Document, Preference, PreferenceBatch, Row, make_batch


def tree(number: int, *, kinds: Sequence[str] = ("chosen", "rejected"), seed: int = 0) -> Document:
    """Sample `number`: a prompt and an answer of each kind, of lengths that follow from the number."""
    rng = np.random.default_rng([seed, number])
    prompt, last = rng.integers(3, 64, 2 + number % 3), rng.integers(3, 64, 1)
    answers = [rng.integers(3, 64, 2 + (number + place) % 4) for place in range(len(kinds))]
    ids, labels = [prompt], [np.full(len(prompt), -100)]
    for answer in answers:
        ids.append(np.concatenate([last, answer[:-1]]))
        labels.append(answer)
    return Document(
        f"pairs.jsonl:{number + 1}", np.concatenate(ids), np.concatenate(labels),
        parts=(len(prompt), *map(len, answers)), preference=Preference(number, tuple(kinds)),
    )  # fmt: skip


def pair_batch(*rows: Sequence[int], **how) -> PreferenceBatch:
    """A micro-batch of rows of samples by their numbers."""
    made = make_batch([Row(tuple(tree(n, **how) for n in row)) for row in rows], pad_id=0, max_seq_len=64)
    assert isinstance(made, PreferenceBatch)
    return made
