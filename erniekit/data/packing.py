"""Samples into rows of at most `row_len` tokens, in one pass over a stream, each sample whole and in exactly one row.

Works on sample numbers and lengths only; a sample must not be longer than a row.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

Rows = Iterator[list[int]]


def one_per_row(order: Iterable[int]) -> Rows:
    """No packing."""
    for sample in order:
        yield [sample]


def pack_in_order(order: Iterable[int], lengths: Sequence[int], *, row_len: int) -> Rows:
    """Fill a row until the next sample doesn't fit; the samples keep their order."""
    row: list[int] = []
    used = 0
    for sample in order:
        if row and used + lengths[sample] > row_len:
            yield row
            row, used = [], 0
        row.append(sample)
        used += lengths[sample]
    if row:
        yield row


def pack_best_fit(order: Iterable[int], lengths: Sequence[int], *, row_len: int, buffer_size: int) -> Rows:
    """Fill a row from a buffer of waiting samples: first the one that waits longest, then always the longest that fits.

    The buffer is filled up again before each choice. As every row begins with the oldest sample, none waits for more
    than `buffer_size` rows.
    """
    stream = iter(order)
    waiting: list[tuple[int, int, int]] = []  # (length, -arrival, sample), sorted: of equal lengths the oldest is last
    queue: deque[tuple[int, int, int]] = deque()  # by arrival; may hold samples that have left `waiting`
    gone: set[int] = set()  # arrivals that are still in `queue`
    num_arrived = 0
    while True:
        row: list[int] = []
        room = row_len
        while True:
            while len(waiting) < buffer_size and (sample := next(stream, None)) is not None:
                entry = (lengths[sample], -num_arrived, sample)
                num_arrived += 1
                bisect.insort(waiting, entry)
                queue.append(entry)
            if row:
                position = bisect.bisect_left(waiting, (room + 1,)) - 1
                if position < 0:
                    break
                entry = waiting.pop(position)
                gone.add(entry[1])
            else:
                while queue and queue[0][1] in gone:
                    gone.remove(queue.popleft()[1])
                if not queue:
                    return
                entry = queue.popleft()
                waiting.pop(bisect.bisect_left(waiting, entry))
            row.append(entry[2])
            room -= entry[0]
        yield row
