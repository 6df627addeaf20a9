"""Another sample's answer after each prompt: by it KTO estimates how far the policy has left its reference at large.

Which answer follows which prompt hangs on the seed alone and stays the same over all epochs, so that a reference can be
computed once. Knows nothing of the loss.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from erniekit.base.errors import DataError
from erniekit.data.batch import MISMATCHED, Document
from erniekit.data.chat import UNTRAINED
from erniekit.data.sampler import permutation
from erniekit.data.store import SampleStore

_KEY = 2  # the stream of random numbers, beside those of the sampler


class MismatchedStore(SampleStore):
    """Samples of one judged answer each, every one with a further branch: the answer of the next sample in a random
    ring (its first turn, where turns have branches of their own), cut where the tree would be longer than `max_len`."""

    def __init__(self, store: SampleStore, *, seed: int, max_len: int) -> None:
        super().__init__(store.sources, store.chosen)
        if self.num_samples < 2:
            raise DataError(
                f"{self.name(0)}: is the only sample; stage KTO needs at least two, because it asks for the answer of "
                "one after the prompt of another."
            )
        self._max_len = max_len
        ring = permutation(self.num_samples, key=(seed, _KEY))
        self._next = np.empty_like(ring)
        self._next[ring] = np.roll(ring, -1)
        trees, lengths = self.trees, self.index["length"]
        self._prompt_lengths = trees["prompt_length"]
        context = self._prompt_lengths - trees["root"]  # what a branch has of the prompt
        answer = trees["first"] - context
        self._taken = np.minimum(answer[self._next], max_len - lengths - context)  # of the other's answer
        self._lengths = lengths + context + self._taken
        self._num_cut = int((self._taken < answer[self._next]).sum())

    @property
    def summary(self) -> str:
        """What the further branches are, in words."""
        cut = f", {self._num_cut:,} of them cut to fit {self._max_len} tokens" if self._num_cut else ""
        return f"beside each answer one of another sample, for the divergence from the reference{cut}"

    def lengths(self) -> Sequence[int]:
        """Tokens of each sample, that branch among them."""
        return array("i", self._lengths.astype(np.int32).tobytes())

    def document(self, sample: int) -> Document:
        """One sample with that branch."""
        own, other = super().document(sample), super().document(int(self._next[sample]))
        taken = int(self._taken[sample])
        length, start = (int(self._prompt_lengths[place]) for place in (sample, self._next[sample]))
        context = own.input_ids[own.parts[0] : length]
        answer, labels = other.input_ids[start : start + taken], other.labels[start - 1 : start + taken]
        untrained = np.full(len(context) - 1, UNTRAINED, np.int32)
        assert own.preference is not None
        kinds = (*own.preference.branches, MISMATCHED)
        return replace(
            own,
            input_ids=np.concatenate([own.input_ids, context, answer]),
            labels=np.concatenate([own.labels, untrained, labels]),
            parts=(*own.parts, len(context) + taken),
            preference=replace(own.preference, branches=kinds),
        )
