"""Words between ranks outside collectives: meeting, sharing, agreeing, over Paddle's TCP store.

A gloo collective fails after 30 seconds without all ranks. Whatever may take longer on one rank (tokenising, saving,
evaluating) therefore ends in a meeting here, where waiting has no limit: a rank asks again and again, so that Ctrl-C is
heard. Not for use by several threads.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from typing import Any

from paddle.base import core

from erniekit.base.errors import MeshError
from erniekit.parallel.pulse import Pulse

_ASK_AGAIN = 0.02  # seconds
_PATIENCE = 120  # seconds for the ranks to come up


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def open_store(master: str, *, rank: int, world: int) -> Any:
    """A TCP store that lives in rank 0 at `master`, "host:port". Raises MeshError if it cannot be had."""
    host, _, port = master.rpartition(":")
    try:
        if rank:
            _await_listener(host, int(port))
        return core.TCPStore(host, int(port), rank == 0, world, _PATIENCE)
    except (RuntimeError, OSError) as error:
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise MeshError(
            f"rank {rank}: {'cannot listen on' if rank == 0 else 'cannot reach rank 0 at'} {master} ({first}). Ranks "
            "meet there: see that the port is free on the first machine and that the others reach it, or set "
            "MASTER_ADDR and MASTER_PORT."
        ) from None


def _await_listener(host: str, port: int) -> None:
    """Knock until somebody listens: Paddle's own client sleeps for 3 seconds if it comes too early."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
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

    def _wait(self, counter: str, until: int) -> None:
        kind, _, name = counter.partition("/")
        number = self._pulse.enter(kind, name)
        while self.store.add(counter, 0) < until:
            time.sleep(_ASK_AGAIN)
        self._pulse.leave(number)

    def meet(self, name: str) -> None:
        """Go on when all ranks have come here, however long that takes."""
        if self.world == 1:
            return
        key = self._key(f"meet/{name}")
        self.store.add(key, 1)
        self._wait(key, self.world)

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
        self.store.add(key, 1)
        self._wait(key, self.world)
        return [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.world)]

    def agree(self, what: str, digest: str, *, way_out: str) -> None:
        """Raise MeshError on every rank, naming those that differ from rank 0, unless all say the same."""
        said = self.collect(f"agree/{what}", digest)
        others = [str(rank) for rank, each in enumerate(said) if each != said[0]]
        if others:
            raise MeshError(
                f"{what} differs between ranks: {', '.join(others)} have another one than rank 0. {way_out}"
            )
