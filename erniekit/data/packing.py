"""Samples into rows of at most `row_len` tokens, in one pass over a stream, each sample whole and in exactly one row.

Works on sample numbers and lengths only; a sample must not be longer than a row.
"""

from __future__ import annotations

import bisect
import itertools
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
    """Best fit decreasing over `buffer_size` samples at a time: the longest first, each into the fullest row with room.

    The rows of a buffer come in the order of their first samples, so that long and short samples stay mixed from the
    first step of an epoch to the last. A buffer's emptiest row waits for the next buffer, once.
    """
    stream = iter(order)
    carried: list[int] = []
    while group := [*carried, *itertools.islice(stream, buffer_size - len(carried))]:
        rows = _best_fit(group, lengths, row_len)
        emptiest = min(rows, key=lambda row: sum(lengths[sample] for sample in row))
        wait = len(group) == buffer_size and len(rows) > 1 and not set(emptiest) & set(carried)
        carried = emptiest if wait else []
        yield from (row for row in rows if row is not carried)


def _best_fit(group: list[int], lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """Rows of the samples in `group`; samples in a row, and rows by their first samples, in the order of the group."""
    rows: list[list[int]] = []  # positions in the group
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for position in sorted(range(len(group)), key=lambda position: -lengths[group[position]]):
        length = lengths[group[position]]
        fit = bisect.bisect_left(rooms, (length,))
        room, row = rooms.pop(fit) if fit < len(rooms) else (row_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(position)
        bisect.insort(rooms, (room - length, row))
    return [[group[position] for position in row] for row in sorted(map(sorted, rows))]
