"""Notices that a job hangs, and names the rank that the others wait for, with the place in the code where it stands.

Every rank notes its last collective or meeting (parallel/pulse.py). A job hangs when no rank has noted anything for
longer than the user's patience: one is then behind the others, and did not come to where they wait.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from erniekit.parallel.pulse import describe, last_sign_of_life, ranks_behind, read_beats

if TYPE_CHECKING:
    from erniekit.cli.supervisor import Rank

PATIENCE = 1800.0  # seconds; a rank may tokenise for long while the others wait
_LOOK = 1.0  # seconds between two looks
_ANSWER = 1.0  # for a rank to write down where it stands


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stack"


def answer_watchdog(folder: Path, rank: int) -> None:
    """In a rank: when the watchdog asks, write down which line every thread is in; works inside a hanging call, too."""
    file = open(_stack_file(folder, rank), "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)


class Watchdog:
    """What `supervise` calls to learn whether its ranks hang; `seconds` is the patience, 0 for ever."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._began, self._next = time.time(), 0.0

    def __call__(self, running: Sequence[Rank]) -> str:
        """What is wrong with the ranks, "" while something happens."""
        now = time.time()
        if not self._seconds or now < self._next:
            return ""
        self._next = now + _LOOK
        beats = read_beats(self._folder, [rank.number for rank in running])
        if now - max(self._began, last_sign_of_life(beats)) < self._seconds:
            return ""
        silent = [rank.number for rank in running if rank.number not in beats]
        late = silent or ranks_behind(beats) or [rank.number for rank in running if rank.is_stopped]
        stacks = [self._stack(rank) for rank in running if rank.number in late]
        names = ", ".join(map(str, late))
        blame = f"the others wait for rank {names}" if late else "all ranks of this machine have come equally far"
        return "\n".join([
            *filter(None, stacks), *describe(beats, now=now),
            f"error: nothing has happened between ranks for {self._seconds:.0f} seconds: {blame}. Where a rank may "
            "take that long by itself (reading much data), --patience gives it more.",
        ])  # fmt: skip

    def late(self, ranks: Sequence[Rank], failed: int) -> str:
        """Lines on the ranks that had not come to where the rank `failed` waited, if that is how it failed: a gloo
        collective gives up after 30 seconds, so that the rank that hangs is not the one that fails."""
        beats = read_beats(self._folder, [rank.number for rank in ranks])
        behind = ranks_behind(beats)
        if failed not in beats or not beats[failed].inside or not behind or failed in behind:
            return ""
        return "\n".join(describe(beats, now=time.time())) + "\n"

    def _stack(self, rank: Rank) -> str:
        """Which line a rank is in; "" if it does not even answer that."""
        path = _stack_file(self._folder, rank.number)
        if not path.is_file():
            return ""
        rank.send(signal.SIGUSR1)
        time.sleep(_ANSWER)
        text = path.read_text(encoding="utf-8").strip()
        return f"rank {rank.number} stands at:\n{text}" if text else f"rank {rank.number} does not answer at all"
