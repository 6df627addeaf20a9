"""Trees of a prompt and its answers made from token numbers, for tests of whatever takes a PreferenceBatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from erniekit.data.batch import CHOSEN, MISMATCHED, REJECTED, Document, Preference, PreferenceBatch, Row, make_batch
from erniekit.data.chat import UNTRAINED


def tree(
    prompt: Sequence[int], answers: Sequence[Sequence[int]], *, kinds: Sequence[str] = (CHOSEN, REJECTED),
    sample: int = 0, score_delta: float = 1.0, share: bool = True,
) -> Document:  # fmt: skip
    """One sample: `prompt` and `answers` with their last tokens, which are only asked for."""
    root = list(prompt[:-1]) if share else []
    ids, labels, parts = list(root), [UNTRAINED] * len(root), [len(root)]
    for answer in answers:
        before = list(prompt[len(root) :])
        ids += [*before, *answer[:-1]]
        labels += [UNTRAINED] * (len(before) - 1) + list(answer)
        parts.append(len(before) + len(answer) - 1)
    preference = Preference(sample, tuple(kinds), score_delta)
    return Document(f"pairs.jsonl:{sample + 1}", np.array(ids, np.int32), np.array(labels, np.int32), tuple(parts),
                    preference)  # fmt: skip


def judged(
    prompt: Sequence[int], answer: Sequence[int], other: Sequence[int], *, desirable: bool, sample: int = 0
) -> Document:
    """One sample of KTO: an answer, and another sample's after the same prompt."""
    return tree(prompt, [answer, other], kinds=(CHOSEN if desirable else REJECTED, MISMATCHED), sample=sample)


def batch_of(*rows: Sequence[Document], max_seq_len: int = 1024) -> PreferenceBatch:
    """The batch of rows of trees."""
    batch = make_batch([Row(tuple(row)) for row in rows], pad_id=0, max_seq_len=max_seq_len)
    assert isinstance(batch, PreferenceBatch)
    return batch


def paths(batch: PreferenceBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each branch of each answer: the row of the batch, and the columns of the prompt and the branch, in order."""
    found = []
    for number in range(batch.num_answers):
        lines, columns = np.nonzero(batch.answer_ids == number)
        line, ends = lines[0], batch.end_rows[lines[0], columns]
        is_shared = (batch.segment_ids[line] == batch.segment_ids[line, columns[0]]) & (batch.answer_ids[line] < 0)
        for end in np.unique(ends):
            found.append((line, np.concatenate([np.flatnonzero(is_shared), columns[ends == end]])))
    return found
