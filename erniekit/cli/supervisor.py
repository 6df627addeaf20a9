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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erniekit.base.files import writing
from erniekit.base.resources import GIB, memory
from erniekit.cli.machines import Bad, Machines
from erniekit.cli.processes import kills_for_memory, memory_of
from erniekit.cli.watchdog import Sign, Watchdog, missing_ranks

_TICK = 0.05  # seconds between two looks
_SETTLE = 0.4  # for others to fail as well, so that the first one can be found
_AGREE = 2.0  # for rank 0 to find the same fault of the user as a quicker rank
_USERS_FAULT = 2  # exit code
_LAST_WAIT = 30.0  # where the user asked to stop and some ranks have: what the others have to finish saving
_STACKS = 3  # late ranks whose place in the code is asked for: each takes a second
_NUM_LINES = 20  # of a log, where a rank left no last words
_NO_MEMORY = ("MemoryError", "ResourceExhaustedError", "bad_alloc", "out of memory", "Out of memory")
INTERRUPTED, FAILED = 130, 1


class Rank:
    """One process of the job. `log` is None for the rank that keeps the terminal."""

    def __init__(self, number: int, words: Sequence[str], *, environment: Mapping[str, str], log: Path | None) -> None:
        self.number, self.words, self.environment, self.log = number, words, environment, log
        self.process: subprocess.Popen[bytes] | None = None
        self.log_start = 0
        self.seen = 0.0  # when it was last seen running
        self.held = 0  # bytes of memory, when somebody looked last

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
        now = time.time()
        code = self.process.poll()
        if code is None:
            self.seen = now
        return code

    def send(self, number: int) -> None:
        """A signal to the process if it runs."""
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, and what it has started even if it has ended itself."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self.process, "the rank was not started"
        return self.process.pid

    def last_lines(self) -> str:
        """The end of what it wrote into its log."""
        if self.log is None or not self.log.is_file():
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
        at = path.stat().st_mtime if self.words else rank.seen
        self.order = (int(self.code != -signal.SIGKILL), at)  # nobody is killed so because another rank failed
        self.killed_for_memory = killed_for_memory

    def text(self, *, world: int) -> str:
        """The message: what the rank said, then which one it was and where its log lies."""
        if self.code == _USERS_FAULT and self.words and self.rank.log is None:
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
                return f"was killed by the system ({name}): memory ran out{self._held()}. {_LESS_MEMORY}"
            return f"was killed by signal {-self.code} ({name}), as the system does when memory runs out{self._held()}"
        if any(word in self.words for word in _NO_MEMORY):
            return f"ran out of memory (exit code {self.code}). {_LESS_MEMORY}"
        return f"ended with exit code {self.code}"

    def _held(self) -> str:
        if not self.rank.held:
            return ""
        return f" (it held {self.rank.held / GIB:.1f} GiB of the {memory()[0] / GIB:.1f} that there are)"


_LESS_MEMORY = "`erniekit doctor CFG` shows the budget; a smaller batch_size or recompute: true needs less"


def supervise(
    ranks: Sequence[Rank], *, folder: Path, world: int, watch: Watchdog | None = None, machines: Machines | None = None
) -> int:
    """Start the ranks, wait for them, and return the exit code of the job. Prints what went wrong, once."""
    machines = machines or Machines.alone()
    killed_before = kills_for_memory()
    with _signals() as asked:
        try:
            for rank in ranks:
                rank.start()
            return _Job(ranks, folder, world, watch, machines, asked, killed_before).wait()
        finally:  # nothing is lost: ranks without one of them cannot go on, and whatever they write is whole or absent
            for rank in ranks:
                rank.end()
            machines.leave()


@dataclass
class _Job:
    """The ranks of this machine while they run."""

    ranks: Sequence[Rank]
    folder: Path
    world: int
    watch: Watchdog | None
    machines: Machines
    asked: list[int]  # signals of the user
    killed_before: int
    passed_on: int = 0
    leaving_since: float = 0.0
    seen: list[Sign] = field(default_factory=list)  # of the ranks here

    def wait(self) -> int:
        """Until all are done, one has failed, or the user has had enough."""
        self.machines.explain = self._explain
        while running := self._running():
            if bad := self._bad(running):
                return self._end(bad)
            if len(self.asked) > 1:
                print("stopped at once; what was saved last stands.", file=sys.stderr)
                return 128 + self.asked[0]
            self._pass_on(running)
            if self._is_overdue():
                numbers = ", ".join(str(rank.number) for rank in running)
                print(f"warning: ranks {numbers} did not stop; they are killed.", file=sys.stderr)
                return self._stopped()
            time.sleep(_TICK)
        if bad := self._failure():
            return self._end(self.machines.settle(bad))
        return self._stopped() if any(rank.code for rank in self.ranks) else 0

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None]

    def _bad(self, running: Sequence[Rank]) -> Bad | None:
        """What the job has to end for: a rank here, something on another machine, or a rank that hangs."""
        if bad := self._failure():
            return self.machines.settle(bad)
        looked = self._look(running)
        if bad := self.machines.poll():
            return bad
        return self._hung() if looked and self.machines.number == 0 and not self._signal else None

    def _look(self, ranks: Sequence[Rank], *, again: bool = False) -> bool:
        """Look at the ranks here, tell machine 0 of them, and answer what it asks; whether it was time for that."""
        found = self.watch.look(ranks, again=again) if self.watch else None
        if found is not None:
            self.seen = found
            for rank in ranks:
                rank.held = memory_of(rank.pid) or rank.held
            self.machines.beat([sign.message() for sign in found])
        while self.watch and self.machines.questions:
            number = self.machines.questions.pop()
            self.machines.answer(number, "".join(self.watch.stack(rank) for rank in ranks if rank.number == number))
        return found is not None

    def _signs(self) -> dict[int, tuple[int, Sign]]:
        """Of every rank of all machines that we know of: its machine, and what is seen of it."""
        found = {sign.rank: (self.machines.number, sign) for sign in self.seen}
        for machine, (news, heard_at) in self.machines.news.items():
            found |= {message["rank"]: (machine, Sign.of(message, heard_at)) for message in news}
        return found

    def _hung(self) -> Bad | None:
        """What is told of a job that hangs; machine 0 judges."""
        assert self.watch
        found = self._signs()
        signs = [sign for _, sign in found.values()]
        late = self.watch.late(signs)
        if late is None:
            return None
        here = {rank.number: rank for rank in self.ranks}
        stacks = [
            self.watch.stack(here[rank]) if rank in here else self.machines.ask(found[rank][0], rank)
            for rank in late[:_STACKS]
        ]
        machine = found[late[0]][0] if late else 0
        text = self.watch.account(signs, late, stacks)
        return self.machines.settle(Bad(text, FAILED, order=(1, time.time()), machine=machine))

    def _explain(self, failed: int) -> str:
        return missing_ranks((sign for _, sign in self._signs().values()), failed)

    @property
    def _signal(self) -> int:
        """The one by which somebody asked to stop, here or on another machine; 0 if nobody did."""
        return self.asked[0] if self.asked else self.machines.asked

    def _has_failed(self, rank: Rank) -> bool:
        by_signal = (-signal.SIGINT, -signal.SIGTERM) if self._signal else ()
        return rank.code not in (None, 0, INTERRUPTED, *by_signal)

    def _only_users_fault(self) -> bool:
        return {rank.code for rank in self.ranks if self._has_failed(rank)} == {_USERS_FAULT}

    def _failure(self) -> Bad | None:
        """The first failure among the ranks of this machine."""
        if not any(self._has_failed(rank) for rank in self.ranks):
            return None
        deadline = time.monotonic() + _AGREE
        time.sleep(_SETTLE)
        while self._only_users_fault() and self.ranks[0].code is None and time.monotonic() < deadline:
            time.sleep(_TICK)
        for_memory = kills_for_memory() > self.killed_before
        failed = [rank for rank in self.ranks if self._has_failed(rank)]
        failures = [Failure(rank, self.folder, killed_for_memory=for_memory) for rank in failed]
        first = min(failures, key=lambda failure: failure.order)
        if first.words:  # what several say is told as that of rank 0, if it is among them
            first = min((each for each in failures if each.words == first.words), key=lambda each: each.rank.number)
        self._look(self.ranks, again=True)
        code, number = first.code if first.code > 0 else 128 - first.code, first.rank.number
        text = first.text(world=self.world)
        return Bad(text, code, order=first.order, machine=self.machines.number, rank=number)

    def _end(self, bad: Bad) -> int:
        """Tell what happened, on machine 0 and where it did."""
        text = bad.text
        if self.machines.number not in (0, bad.machine):
            text = f"error: stopped by a failure of machine {bad.machine}, which machine 0 tells of."
        print(text, file=sys.stderr, flush=True)
        return bad.code

    def _pass_on(self, running: Sequence[Rank]) -> None:
        """Hand the user's request to the ranks, once; a lost terminal asks as SIGTERM does."""
        if not self._signal or self.passed_on:
            return
        self.passed_on = signal.SIGTERM if self._signal == signal.SIGHUP else self._signal
        for rank in running:
            rank.send(self.passed_on)
        if self.asked:
            self.machines.pass_on(self.passed_on)

    def _is_overdue(self) -> bool:
        """Whether some ranks have stopped long ago, as they were asked to, and these have not."""
        stopped = [rank for rank in self.ranks if rank.code is not None]
        if not stopped or not (self._signal or any(rank.code for rank in stopped)):
            return False
        self.leaving_since = self.leaving_since or time.monotonic()
        return time.monotonic() - self.leaving_since > _LAST_WAIT

    def _stopped(self) -> int:
        return 128 + self._signal if self._signal else INTERRUPTED


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
