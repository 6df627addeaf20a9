"""The order of samples over all epochs, and which rows belong to a step.

Everything is a function of the seed and of the samples' lengths: nothing is remembered, so a run resumes at any step
without reading data. Random numbers are the raw output of PCG64, which numpy promises never to change (it does not
promise that of `Generator.permutation`). Knows sample numbers, not tokens or files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_SHUFFLE, _DRAW = 0, 1  # streams of random numbers
_DRAWS_AT_ONCE = 1 << 16


def permutation(size: int, *, key: Sequence[int]) -> np.ndarray:
    """A random order of `size` things, the same for the same key on every machine."""
    return np.argsort(np.random.PCG64(list(key)).random_raw(size), kind="stable")


@dataclass(frozen=True)
class Concat:
    """All samples of all sources, each once an epoch."""

    num_samples: int
    seed: int
    shuffle: bool

    def epoch(self, number: int) -> Iterator[int]:
        """The sample numbers of an epoch."""
        if not self.shuffle:
            return iter(range(self.num_samples))
        return iter(permutation(self.num_samples, key=(self.seed, _SHUFFLE, number)).tolist())


@dataclass(frozen=True)
class RandomMix:
    """Virtual epochs: `epoch_size` times a source is drawn by weight, and gives its next sample.

    Each source goes through its own samples without replacement, in a new order each time, and on over virtual epochs.
    """

    source_sizes: tuple[int, ...]
    weights: tuple[float, ...]
    epoch_size: int
    seed: int
    shuffle: bool

    def epoch(self, number: int) -> Iterator[int]:
        """The sample numbers of a virtual epoch; sources lie one after another in the numbering."""
        firsts = np.cumsum([0, *self.source_sizes])
        taken = np.zeros(len(self.source_sizes), np.int64)
        for drawn in self._draws(0, number * self.epoch_size):
            taken += np.bincount(drawn, minlength=len(taken))
        walks = [self._walk(source, int(firsts[source]), int(start)) for source, start in enumerate(taken)]
        for drawn in self._draws(number * self.epoch_size, (number + 1) * self.epoch_size):
            for source in drawn.tolist():
                yield next(walks[source])

    def _draws(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The sources of the draws from `start` to `stop`, counted from the start of the run."""
        bits = np.random.PCG64([self.seed, _DRAW]).advance(start)
        shares = np.cumsum(self.weights) / sum(self.weights)
        for done in range(start, stop, _DRAWS_AT_ONCE):
            raw = bits.random_raw(min(_DRAWS_AT_ONCE, stop - done))
            yield np.searchsorted(shares[:-1], (raw >> np.uint64(11)) * 2.0**-53, side="right")

    def _walk(self, source: int, first: int, start: int) -> Iterator[int]:
        size = self.source_sizes[source]
        done, within = divmod(start, size)
        for time in itertools.count(done):
            key = (self.seed, _SHUFFLE, time, source)
            order = permutation(size, key=key) if self.shuffle else np.arange(size)
            yield from (first + order[within:]).tolist()
            within = 0


@dataclass
class _Epoch:
    """The rows of one epoch, packed as far as they were asked for."""

    waiting: Iterator[list[int]]
    rows: list[np.ndarray] = field(default_factory=list)

    def fill(self, num_rows: float) -> int:
        """Pack until there are `num_rows` rows, or all; how many there are."""
        while len(self.rows) < num_rows and (row := next(self.waiting, None)) is not None:
            self.rows.append(np.array(row, np.int32))
        return len(self.rows)


class RowOrder:
    """The rows of all epochs, one after another without a gap: a step may begin in one epoch and end in the next."""

    def __init__(self, pack_epoch: Callable[[int], Iterator[list[int]]]) -> None:
        """`pack_epoch(number)` yields the rows of an epoch, the same ones each time."""
        self._pack_epoch = pack_epoch
        self._epochs: dict[int, _Epoch] = {}  # the last two that were used
        self._num_rows: list[int] = []  # of the epochs that were packed to their end

    def rows(self, first: int, count: int) -> list[np.ndarray]:
        """Sample numbers of `count` rows from row `first` on, counted from the start of the run."""
        number = 0
        while number < len(self._num_rows) and first >= self._num_rows[number]:
            first -= self._num_rows[number]
            number += 1
        found: list[np.ndarray] = []
        while len(found) < count:
            epoch = self._epoch(number)
            if epoch.fill(first + count - len(found)) < first + count - len(found):
                self._close(number)
            found += epoch.rows[first : first + count - len(found)]
            first = max(0, first - len(epoch.rows))
            number += 1
        return found

    def rows_in_epoch(self, number: int) -> int:
        """How many rows an epoch has."""
        for earlier in range(len(self._num_rows), number + 1):
            self._close(earlier)
        return self._num_rows[number]

    def rows_in_epochs(self, num_epochs: float) -> int:
        """How many rows a number of epochs has, rounded up."""
        whole = math.floor(num_epochs)
        rows = sum(self.rows_in_epoch(number) for number in range(whole))
        return rows + math.ceil((num_epochs - whole) * self.rows_in_epoch(whole)) if num_epochs > whole else rows

    def _close(self, number: int) -> None:
        num_rows = self._epoch(number).fill(math.inf)
        if number == len(self._num_rows):
            self._num_rows.append(num_rows)

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._epochs.pop(number, None) or _Epoch(self._pack_epoch(number))
        self._epochs[number] = epoch
        while len(self._epochs) > 2:
            del self._epochs[next(iter(self._epochs))]
        return epoch
