"""Watches the rank processes of one machine: starts them, hears of the first failure, tells it once, ends the others.

Rank 0 keeps the terminal, the others write to their logs. A rank that fails leaves its last words (a traceback, or what
the user has to mend) in the job's folder, with the time: when one rank dies, others fail because of it, often before
anybody looks, and only the first failure is told. Knows processes, signals and files; nothing of training.

Why not Paddle's own controller, which starts processes as well: docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from erniekit.base.files import writing

_TICK = 0.05  # seconds between two looks
_SETTLE = 0.4  # for others to fail as well, so that the first one can be found
_LEAVE = 3.0  # from SIGTERM to SIGKILL, where a rank has failed
_LAST_WAIT = 30.0  # where the user asked to stop and some ranks have: what the others have to finish saving
_NUM_LINES = 20  # of a log, where a rank left no last words
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
_NO_MEMORY = ("MemoryError", "ResourceExhaustedError", "bad_alloc", "out of memory", "Out of memory")
INTERRUPTED, FAILED = 130, 1


class Rank:
    """One process of the job. `log` is None for the rank that keeps the terminal."""

    def __init__(self, number: int, words: Sequence[str], *, environment: Mapping[str, str], log: Path | None) -> None:
        self.number, self.words, self.environment, self.log = number, words, environment, log
        self.process: subprocess.Popen[bytes] | None = None
        self.log_start = 0
        self.ended_at: float | None = None

    def start(self) -> None:
        """Begin, in a session of its own: Ctrl-C reaches the supervisor alone, which passes it on."""
        with contextlib.ExitStack() as stack:
            out: Any = None
            if self.log:
                with writing(self.log):
                    self.log.parent.mkdir(parents=True, exist_ok=True)
                    out = stack.enter_context(open(self.log, "ab"))
                head = f"== rank {self.number}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
                out.write(head.encode())
                out.flush()
                self.log_start = out.tell()
            self.process = subprocess.Popen(
                self.words, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs. Minus a number: the signal that killed it."""
        assert self.process, "the rank was not started"
        code = self.process.poll()
        if code is not None and self.ended_at is None:
            self.ended_at = time.time()
        return code

    def send(self, number: int) -> None:
        """A signal to the process if it runs; to its children too if it is SIGKILL."""
        assert self.process, "the rank was not started"
        if self.code is None:
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def last_lines(self) -> str:
        """The end of what it wrote into its log."""
        if self.log is None:
            return ""
        with open(self.log, "rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - 100_000))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_NUM_LINES:])


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the new process: if the supervisor is killed, the system kills the rank (Linux)."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(set_death_signal, signal.SIGKILL)


def words_file(folder: Path, rank: int) -> Path:
    """Where a rank of the job leaves its last words."""
    return folder / f"rank-{rank}.words"


class Failure:
    """What the first rank that failed has to say."""

    def __init__(self, rank: Rank, folder: Path, *, killed_for_memory: bool) -> None:
        path = words_file(folder, rank.number)
        self.rank, self.code = rank, rank.code or 0
        self.words = path.read_text(encoding="utf-8") if path.is_file() else ""
        at = path.stat().st_mtime if self.words else rank.ended_at or 0.0
        self.order = (self.code != -signal.SIGKILL, at)  # nobody is killed so because another rank failed
        self.killed_for_memory = killed_for_memory

    @property
    def exit_code(self) -> int:
        """What the whole job ends with."""
        return self.code if self.code > 0 else 128 - self.code

    def text(self, *, world: int) -> str:
        """The message: what the rank said, then which one it was and where its log lies."""
        if self.code == 2 and self.words and self.rank.log is None:
            return self.words.rstrip()
        said = self.words or self.rank.last_lines()
        log = f" Its log: {self.rank.log}." if self.rank.log else ""
        return f"{said.rstrip()}\nerror: rank {self.rank.number} of {world} {self._how()}.{log}".lstrip()

    def _how(self) -> str:
        if self.code < 0:
            name = signal.Signals(-self.code).name
            if -self.code != signal.SIGKILL:
                return f"was killed by signal {-self.code} ({name})"
            if self.killed_for_memory:
                return f"was killed by the system ({name}): memory ran out. {_LESS_MEMORY}"
            return f"was killed by signal {-self.code} ({name}), as the system does when memory runs out"
        if any(word in self.words for word in _NO_MEMORY):
            return f"ran out of memory (exit code {self.code}). {_LESS_MEMORY}"
        return f"ended with exit code {self.code}"


_LESS_MEMORY = "`erniekit doctor CFG` shows the budget; a smaller batch_size or recompute: true needs less"


Watch = Callable[[Sequence[Rank]], str]  # given the ranks that run, what is wrong with them, or ""


def supervise(ranks: Sequence[Rank], *, folder: Path, world: int, watch: Watch | None = None) -> int:
    """Start the ranks, wait for them, and return the exit code of the job. Prints what went wrong, once."""
    killed_before = _kills_for_memory()
    with _signals() as asked:
        try:
            for rank in ranks:
                rank.start()
            return _Job(ranks, folder, world, watch, asked, killed_before).wait()
        finally:
            for rank in ranks:
                if rank.process:
                    rank.send(signal.SIGKILL)
                    rank.process.wait()


class _Job:
    """The ranks of this machine while they run."""

    def __init__(
        self, ranks: Sequence[Rank], folder: Path, world: int, watch: Watch | None, asked: list[int], killed_before: int
    ) -> None:
        self._ranks, self._folder, self._world, self._watch = ranks, folder, world, watch
        self._asked, self._killed_before, self._passed_on, self._leaving_since = asked, killed_before, 0, 0.0

    def wait(self) -> int:
        """Until all are done, one has failed, or the user has had enough."""
        while running := self._running():
            if any(self._failed(rank) for rank in self._ranks):
                return self._end_after_failure()
            if len(self._asked) > 1:
                print("stopped at once; what was saved last stands.", file=sys.stderr)
                return 128 + self._asked[0]
            if self._asked:
                self._pass_on(running)
                if self._is_overdue(running):
                    numbers = ", ".join(str(rank.number) for rank in running)
                    print(f"warning: ranks {numbers} did not stop; they are killed.", file=sys.stderr)
                    return 128 + self._asked[0]
            elif problem := self._watch(running) if self._watch else "":
                print(f"{problem}\nerror: the job is stopped; what was saved last stands.", file=sys.stderr)
                _end(running)
                return FAILED
            time.sleep(_TICK)
        if any(self._failed(rank) for rank in self._ranks):
            return self._end_after_failure()
        return 128 + self._asked[0] if self._asked and any(rank.code for rank in self._ranks) else 0

    def _running(self) -> list[Rank]:
        return [rank for rank in self._ranks if rank.code is None]

    def _failed(self, rank: Rank) -> bool:
        expected = (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM) if self._asked else ()
        return rank.code not in (None, 0, *expected)

    def _pass_on(self, running: Sequence[Rank]) -> None:
        """Hand the user's signal to the ranks, once; a lost terminal asks as SIGTERM does."""
        if not self._passed_on:
            self._passed_on = signal.SIGTERM if self._asked[0] == signal.SIGHUP else self._asked[0]
            for rank in running:
                rank.send(self._passed_on)

    def _is_overdue(self, running: Sequence[Rank]) -> bool:
        """Whether some ranks have stopped long ago and these have not."""
        if len(running) == len(self._ranks):
            return False
        self._leaving_since = self._leaving_since or time.monotonic()
        return time.monotonic() - self._leaving_since > _LAST_WAIT

    def _end_after_failure(self) -> int:
        time.sleep(_SETTLE)
        for_memory = _kills_for_memory() > self._killed_before
        failures = [
            Failure(rank, self._folder, killed_for_memory=for_memory) for rank in self._ranks if self._failed(rank)
        ]
        first = min(failures, key=lambda failure: failure.order)
        same = [failure for failure in failures if failure.words == first.words]
        told = min(same, key=lambda failure: failure.rank.number) if first.words else first
        others = self._running()
        print(told.text(world=self._world), file=sys.stderr, flush=True)
        _end(others)
        return first.exit_code


def _end(ranks: Sequence[Rank]) -> None:
    """SIGTERM, a little time, SIGKILL."""
    for rank in ranks:
        rank.send(signal.SIGTERM)
    deadline = time.monotonic() + _LEAVE
    while time.monotonic() < deadline and any(rank.code is None for rank in ranks):
        time.sleep(_TICK)
    for rank in ranks:
        rank.send(signal.SIGKILL)


def _kills_for_memory() -> int:
    """How many processes of this container the system has killed because memory ran out."""
    try:
        rows = dict(line.split() for line in _MEMORY_EVENTS.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get("oom_kill", 0))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects what the user asks for instead of dying of it."""
    asked: list[int] = []
    take: Callable[[int, Any], None] = lambda number, _frame: asked.append(number)  # noqa: E731 - a handler
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
