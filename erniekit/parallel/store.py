"""Words between ranks outside collectives: meeting, sharing, agreeing, over Paddle's TCP store.

A gloo collective fails after 30 seconds without all ranks. Whatever may take longer on one rank (tokenising, saving,
evaluating) therefore ends in a meeting here, where waiting has no limit: a rank asks again and again, so that Ctrl-C is
heard. Not for use by several threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paddle.base import core

from erniekit.base.console import warn
from erniekit.base.errors import MeshError, listed
from erniekit.base.ports import free_port, hold_port
from erniekit.parallel.pulse import Pulse

_ASK_AGAIN, _ASK_SELDOM = 0.02, 0.5  # seconds, at first and when it takes long: many ranks ask, and rank 0 answers
_PATIENCE = 120  # seconds for all ranks to come up
_PATIENCE_WITH_NAMES = 20  # seconds for the name of rank 0's machine to be known
_QUIET = 10  # seconds of waiting that nobody is told of
_TRIES = 5  # ports
_ABSENT = "absent"
_FAREWELL = 0.2  # seconds that rank 0 stays after the last word


def open_store(master: str, *, rank: int) -> Any:
    """A TCP store that lives in rank 0 at `master`, "host:port". Raises MeshError if it cannot be had."""
    host, _, port = master.rpartition(":")
    try:
        if rank:
            _await_listener(host, int(port), rank)
        else:
            hold_port(int(port)).close()  # if somebody has it, Paddle aborts the process
        store = core.TCPStore(host, int(port), rank == 0, 1, _PATIENCE)  # 1: who else comes is not its business
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        verb = "cannot reach rank 0 at" if rank else "cannot listen on"
        raise MeshError(
            f"rank {rank} {verb} {master} ({_reason(error)}). Ranks meet there: see that the port is free on the first "
            "machine and that the others reach it, or set MASTER_ADDR and MASTER_PORT."
        ) from None
    _send_at_once(int(port))
    return store


def open_free_store(host: str) -> tuple[Any, str]:
    """A store that lives here at a port that is free, and its address under the name that others call this machine."""
    for _ in range(_TRIES - 1):
        address = f"{host}:{free_port()}"
        try:
            return open_store(address, rank=0), address
        except MeshError:  # somebody was quicker to take the port
            continue
    address = f"{host}:{free_port()}"
    return open_store(address, rank=0), address


def _reason(error: Exception) -> str:
    """The sentence of an error that says something, of Paddle's many lines."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line), lines[-1] if lines else type(error).__name__)


def _send_at_once(port: int) -> None:
    """Make this process's connections to `port` send without waiting for more, which Paddle forgets: a question to the
    store takes 45 ms otherwise, and opening a group asks many. Linux shows which they are; elsewhere it stays slow."""
    if not sys.platform.startswith("linux"):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as ours:
                internet = ours.family in (socket.AF_INET, socket.AF_INET6)
                if internet and ours.type == socket.SOCK_STREAM and ours.getpeername()[1] == port:
                    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # closed meanwhile, or connected with nobody
            continue


def _await_listener(host: str, port: int, rank: int) -> None:
    """Knock until somebody listens: Paddle's own client sleeps for 3 seconds if it comes too early."""
    started, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
            return
        except OSError as error:
            waited = time.monotonic() - started
            if waited > (_PATIENCE_WITH_NAMES if isinstance(error, socket.gaierror) else _PATIENCE):
                raise
            if waited > _QUIET and not told:
                warn(f"rank {rank} still waits for rank 0 at {host}:{port} ({_reason(error)})")
                told = True
            time.sleep(_ASK_AGAIN)


class Words:
    """The store as one rank of `world` uses it. With one rank there is none, and nobody to wait for."""

    def __init__(self, store: Any, *, rank: int, world: int, pulse: Pulse | None = None) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._pulse = pulse or Pulse()
        self._used: Counter[str] = Counter()

    def _key(self, name: str) -> str:
        """Every use of a name is a key of its own, the same on all ranks."""
        self._used[name] += 1
        return f"{name}#{self._used[name]}"

    def _wait(self, counter: str, until: int, *, add: int = 0) -> None:
        """Add to a counter, and go on when it has come to `until`."""
        kind, _, name = counter.partition("/")
        number, began = self._pulse.enter(kind, name), time.monotonic()
        try:
            self.store.add(counter, add)
            while self.store.add(counter, 0) < until:
                time.sleep(min(max(_ASK_AGAIN, (time.monotonic() - began) / 100), _ASK_SELDOM))
        except (RuntimeError, ValueError) as error:
            raise MeshError(
                f"rank {self.rank}: rank 0, at which all meet, is gone ({_reason(error)}); its log says why."
            ) from None
        self._pulse.leave(number)

    def await_ranks(self) -> None:
        """Go on when all ranks have opened the store. Raises MeshError with those that did not come."""
        self.store.add(f"here/{self.rank}", 1)
        started, told, missing = time.monotonic(), False, list(range(self.world))
        while True:
            missing = [rank for rank in missing if not self.store.add(f"here/{rank}", 0)]
            if not missing:
                return
            waited, names = time.monotonic() - started, ", ".join(map(str, missing))
            if waited > _PATIENCE:
                raise MeshError(
                    f"rank {self.rank} has waited {_PATIENCE} seconds for ranks {names} of {self.world}. See their "
                    "logs, and that as many processes are started as PADDLE_TRAINERS_NUM or NNODES x --nproc says."
                )
            if waited > _QUIET and not told and self.rank == 0:
                warn(f"still waiting for ranks {names} of {self.world}")
                told = True
            time.sleep(_ASK_AGAIN)

    def meet(self, name: str) -> None:
        """Go on when all ranks have come here, however long that takes."""
        if self.world == 1:
            return
        self._wait(self._key(f"meet/{name}"), self.world, add=1)

    def part(self) -> None:
        """Before ranks end, in good order or with an error that all have: nobody leaves before all are here, and rank
        0, where the store lives, last."""
        self.meet("close")
        if self.rank == 0 and self.world > 1:
            time.sleep(_FAREWELL)

    def share(self, name: str, value: Any = None) -> Any:
        """What rank 0 says, anything that JSON can carry; the others' `value` does not count."""
        if self.world == 1:
            return value
        key = self._key(f"share/{name}")
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            self.store.add(key + "/told", 1)
            self._pulse.leave(self._pulse.enter("share", name))
            return json.loads(json.dumps(value))
        self._wait(key + "/told", 1)
        return json.loads(self.store.get(key))

    def collect(self, name: str, value: Any) -> list[Any]:
        """What every rank says, in rank order."""
        if self.world == 1:
            return [value]
        key = self._key(f"collect/{name}")
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        self._wait(key, self.world, add=1)
        return [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.world)]

    def agree(self, what: str, facts: Mapping[str, str], *, way_out: str) -> None:
        """Raise MeshError on every rank, naming what differs and where, unless all know the same facts. Then these were
        the last words."""
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        if len(set(self.collect(f"agree/{what}", digest))) == 1:
            return
        first = self.share(f"rank 0 knows/{what}", dict(facts))
        differing = [name for name in {*first, *facts} if first.get(name) != facts.get(name)]
        others = self.collect(f"others know/{what}", {name: facts.get(name, _ABSENT) for name in differing})
        found = "; ".join(listed(_differences(first, others), limit=8))
        self.part()
        raise MeshError(f"{what} differs between ranks: {found}. {way_out}")


def _differences(first: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What rank 0 knows, and what each rank knows otherwise, as a clause for each fact."""
    for name in sorted({name for known in others for name in known}):
        ranks: dict[str, list[str]] = defaultdict(list)
        for rank, known in enumerate(others):
            if name in known:
                ranks[known[name]].append(str(rank))
        elsewhere = ", ".join(f"{value} on rank {', '.join(listed(at, limit=8))}" for value, at in ranks.items())
        yield f"{name} is {first.get(name, _ABSENT)} on rank 0, {elsewhere}"
