"""What every rank is doing now, for a watchdog in another process: its last collective or meeting, its step, its phase.

A rank writes one short record over and over into a mapped file, which costs microseconds and needs nobody's help: a
process that hangs, or that was killed, still shows where. All ranks run the same collectives in the same order, so the
rank with the lowest count is the one that the others wait for. On GPUs a collective counts as over when the host goes
on, which may be before the device is done. Outside training steps a rank may work alone for long (reading data,
evaluating, saving): it is in a phase then. Knows no Paddle, and not what a rank should be doing.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_RECORD = struct.Struct("<qqqd?23s32s64sq")  # the first and the last number are equal, unless a write is under way
_TRIES = 100
_STARTING, _BETWEEN = "getting ready", "between steps"


@dataclass(frozen=True)
class Beat:
    """What a rank noted last. `number` counts its collectives and meetings; `inside`: it waits in that one."""

    rank: int
    number: int
    step: int  # -1 before the first
    at: float  # seconds since the epoch
    inside: bool
    kind: str
    where: str  # the axis, or the name of the meeting
    phase: str = ""  # what it does outside steps

    def text(self, now: float) -> str:
        """A line for people."""
        since, step = max(now - self.at, 0), f"step {self.step}" if self.step >= 0 else "before the first step"
        head = f"rank {self.rank}, {step}{', ' * bool(self.phase)}{self.phase}"
        if not self.number:
            return f"{head}: no collective yet, for {since:.0f} s"
        what = f"{self.kind} '{self.where}' (number {self.number})"
        return f"{head}: {'waits in' if self.inside else 'is done with'} {what}, for {since:.0f} s"

    @property
    def place(self) -> int:
        """How far the rank has come."""
        return 2 * self.number - self.inside


class Pulse:
    """The writing side. Without a folder nothing is written."""

    def __init__(self, folder: str | Path = "", *, rank: int = 0) -> None:
        self._map: mmap.mmap | None = None
        self._number, self._step, self._writes = 0, -1, 0
        self._kind = self._where = b""
        self._phase = _STARTING
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(_path(folder, rank), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(descriptor, _RECORD.size)
                self._map = mmap.mmap(descriptor, _RECORD.size)
            finally:
                os.close(descriptor)
            self._write(inside=False)

    def enter(self, kind: str, where: str) -> int:
        """A collective or a meeting begins; its number."""
        self._number += 1
        self._kind, self._where = kind.encode(), where.encode()
        self._write(inside=True)
        return self._number

    def leave(self, number: int) -> None:
        """The one with this number is over."""
        if number == self._number:  # else another one has begun, which says more
            self._write(inside=False)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A training step: nobody works alone for long."""
        self._step, self._phase = step, ""
        self._write(inside=False)
        yield
        self._phase = _BETWEEN
        self._write(inside=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Work outside steps that has a name."""
        before, self._phase = self._phase, name
        self._write(inside=False)
        yield
        self._phase = before
        self._write(inside=False)

    def _write(self, *, inside: bool) -> None:
        if self._map is not None:
            self._writes += 1
            facts = (self._number, self._step, time.time(), inside, self._kind, self._phase.encode(), self._where)
            _RECORD.pack_into(self._map, 0, self._writes, *facts, self._writes)


def read_beats(folder: str | Path, ranks: Iterable[int]) -> dict[int, Beat]:
    """What each of `ranks` noted last; those that have noted nothing are left out."""
    found = {}
    for rank in ranks:
        beat = _read(_path(folder, rank), rank)
        if beat is not None:
            found[rank] = beat
    return found


def ranks_behind(beats: dict[int, Beat]) -> list[int]:
    """Those that the others wait for; none if all have come equally far."""
    places = {rank: beat.place for rank, beat in beats.items()}
    least = min(places.values(), default=0)
    behind = [rank for rank, place in places.items() if place == least]
    return behind if len(behind) < len(places) else []


def last_sign_of_life(beats: dict[int, Beat]) -> float:
    """When the last of the notes was written, in seconds since the epoch; 0 without any."""
    return max((beat.at for beat in beats.values()), default=0.0)


def describe(beats: dict[int, Beat], *, now: float) -> list[str]:
    """Lines that say where every rank is, those that the others wait for first and named as such."""
    behind = ranks_behind(beats)
    lines = [f"{beats[rank].text(now)}: the others wait for it" for rank in behind]
    return lines + [beat.text(now) for rank, beat in sorted(beats.items()) if rank not in behind]


def _path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.pulse"


def _read(path: Path, rank: int) -> Beat | None:
    for _ in range(_TRIES):
        try:
            data, again = path.read_bytes(), path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) == _RECORD.size and data == again:
            first, number, step, at, inside, kind, phase, where, last = _RECORD.unpack(data)
            if first and first == last:
                names = (text.rstrip(b"\0").decode(errors="replace") for text in (kind, where, phase))
                return Beat(rank, number, step, at, inside, *names)
    return None
