"""Notices that a job hangs, and names the rank that the others wait for, with the place in the code where it stands.

Every rank notes its last collective or meeting (parallel/pulse.py). A job hangs when no rank of any machine has noted
anything for longer than the user's patience: one is then behind the others, and did not come to where they wait. That
rank may be reading, evaluating or saving, which takes as long as it takes: outside training steps it does not hang
while its process, or one that it started, computes or moves bytes. The watchdogs of all machines look at their own
ranks, that of machine 0 judges.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erniekit.cli.processes import is_stopped, work_of
from erniekit.parallel.pulse import Beat, describe, last_sign_of_life, ranks_behind, read_beats

if TYPE_CHECKING:
    from erniekit.cli.supervisor import Rank

PATIENCE = 1800.0  # seconds
_LOOK = 1.0  # seconds between two looks
_ANSWER = 1.0  # for a rank to write down where it stands
_BUSY, _MOVED = 0.03, 1 << 20  # a process works that takes this share of a core, or moves so many bytes in a window
_WINDOW = 10.0  # seconds


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stack"


def answer_watchdog(folder: Path, rank: int) -> None:
    """In a rank: when the watchdog asks, write down which line every thread is in; works inside a hanging call, too."""
    file = open(_stack_file(folder, rank), "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)


@dataclass(frozen=True)
class Sign:
    """What is seen of a rank from outside: its last note, when its process last worked, whether it was stopped."""

    rank: int
    beat: Beat | None
    worked_at: float
    is_stopped: bool = False

    def message(self) -> dict[str, Any]:
        """As it is sent to another machine, whose clock is another."""
        now = time.time()
        beat = asdict(self.beat) | {"at": self.beat.at - now} if self.beat else None
        return asdict(self) | {"beat": beat, "worked_at": self.worked_at - now}

    @classmethod
    def of(cls, message: Mapping[str, Any], heard_at: float) -> Sign:
        """The sign in a message."""
        beat = message["beat"]
        return cls(
            message["rank"], Beat(**beat | {"at": beat["at"] + heard_at}) if beat else None,
            message["worked_at"] + heard_at, message["is_stopped"],
        )  # fmt: skip

    @property
    def may_work_alone(self) -> bool:
        """Whether it is outside training steps, or has not noted anything yet."""
        return self.beat is None or bool(self.beat.phase)


class _Meter:
    """When a process has last worked, by what it takes of a core and moves of files, in windows of some seconds."""

    def __init__(self) -> None:
        self._at, self._seconds, self._moved, self.worked_at = 0.0, 0.0, 0, time.time()

    def look(self, process: int, *, window: float) -> float:
        now = time.time()
        if now - self._at >= window:
            seconds, moved = work_of(process)
            if seconds - self._seconds > _BUSY * (now - self._at) or moved - self._moved > _MOVED:
                self.worked_at = now
            self._at, self._seconds, self._moved = now, seconds, moved
        return self.worked_at


class Watchdog:
    """What `supervise` calls to learn whether its ranks hang; `seconds` is the patience, 0 for ever."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._began, self._next = time.time(), 0.0
        self._meters: dict[int, _Meter] = {}

    def look(self, ranks: Sequence[Rank], *, again: bool = False) -> list[Sign] | None:
        """The signs of these ranks; None if it is too early to look, unless `again`."""
        now = time.time()
        if now < self._next and not again:
            return None
        self._next = now + _LOOK
        beats, window = read_beats(self._folder, [rank.number for rank in ranks]), min(_WINDOW, self._seconds / 4)
        return [
            Sign(
                rank.number, beats.get(rank.number), is_stopped=is_stopped(rank.pid),
                worked_at=self._meters.setdefault(rank.number, _Meter()).look(rank.pid, window=window),
            )
            for rank in ranks
        ]  # fmt: skip

    def late(self, signs: Iterable[Sign]) -> list[int] | None:
        """The ranks that the others wait for if the job hangs (none if that is nobody), and None if it does not."""
        now, all_of_them = time.time(), {sign.rank: sign for sign in signs}
        beats = _beats(all_of_them.values())
        if not self._seconds or now - max(self._began, last_sign_of_life(beats)) < self._seconds:
            return None
        silent = [sign.rank for sign in all_of_them.values() if not sign.beat]
        stopped = [sign.rank for sign in all_of_them.values() if sign.is_stopped]
        found = silent or ranks_behind(beats) or stopped
        for rank in found or all_of_them:
            sign = all_of_them[rank]
            if sign.may_work_alone and not sign.is_stopped and now - sign.worked_at < self._seconds:
                return None
        return found

    def account(self, signs: Iterable[Sign], late: Sequence[int], stacks: Iterable[str]) -> str:
        """What is told of a job that hangs."""
        names = ", ".join(map(str, late))
        blame = f"the others wait for rank {names}" if late else "all ranks have come equally far"
        return "\n".join([
            *filter(None, stacks), *describe(_beats(signs), now=time.time()),
            f"error: nothing has happened between ranks for {self._seconds:.0f} seconds: {blame}. Where a rank may "
            "take that long by itself, --patience gives it more.",
        ])  # fmt: skip

    def stack(self, rank: Rank) -> str:
        """Which line a rank is in; "" if it cannot be asked."""
        path = _stack_file(self._folder, rank.number)
        if not path.is_file():
            return ""
        rank.send(signal.SIGUSR1)
        time.sleep(_ANSWER)
        text = path.read_text(encoding="utf-8").strip()
        return f"rank {rank.number} stands at:\n{text}" if text else f"rank {rank.number} does not answer at all"


def missing_ranks(signs: Iterable[Sign], failed: int) -> str:
    """Lines on the ranks that had not come to where the rank `failed` waited, if that is how it failed: a gloo
    collective gives up after 30 seconds, so that the rank that hangs is not the one that fails."""
    beats = _beats(signs)
    behind = ranks_behind(beats)
    if failed not in beats or not beats[failed].inside or not behind or failed in behind:
        return ""
    return "\n".join(describe(beats, now=time.time())) + "\n"


def _beats(signs: Iterable[Sign]) -> dict[int, Beat]:
    return {sign.rank: sign.beat for sign in signs if sign.beat}
