"""The samples of a step: how many there are, and what was seen of them, over all ranks that have some.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle

from erniekit.data.batch import PreferenceBatch
from erniekit.ops.cross_entropy import IGNORED
from erniekit.parallel.collectives import Axis

Seen = Any  # a NamedTuple of tensors [N]: what a loss is made from


def answer_lengths(batch: PreferenceBatch) -> np.ndarray:
    """Tokens of each answer, [A]."""
    return np.bincount(batch.answer_ids[batch.labels != IGNORED], minlength=batch.num_answers)


class Counts(NamedTuple):
    """Counts over a whole step, or over all held-out samples."""

    samples: int = 0
    chosen: int = 0  # samples with a chosen answer
    chosen_tokens: int = 0

    @classmethod
    def of(cls, batches: Sequence[PreferenceBatch]) -> Counts:
        """Count those that count."""
        batches = [batch for batch in batches if batch.counts]
        chosen = [batch.chosen[batch.desirable] for batch in batches]
        tokens = [answer_lengths(batch)[answers].sum() for batch, answers in zip(batches, chosen, strict=True)]
        return cls(sum(len(b.samples) for b in batches), sum(map(len, chosen)), int(sum(tokens)))

    def over(self, data: Axis) -> Counts:
        """The counts of all ranks of the data axis together."""
        return self if data.size == 1 else Counts(*data.all_reduce(paddle.to_tensor(list(self), "int64")).tolist())

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


def joined(seen: Sequence[Seen]) -> Seen:
    """What was seen, one after the other."""
    return type(seen[0])(*map(paddle.concat, zip(*seen, strict=True)))


def gathered(seen: Seen, data: Axis) -> tuple[Seen, int]:
    """What all ranks of the data axis have seen, rank after rank, without gradients; and where the own part begins."""
    if data.size == 1:
        return seen, 0
    mine = paddle.stack(list(seen), -1).detach()
    sizes = data.all_gather(paddle.to_tensor([len(mine)], "int64")).tolist()
    return type(seen)(*data.gather_uneven(mine, sizes).unbind(-1)), sum(sizes[: data.index])
