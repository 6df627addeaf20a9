"""Run a function on several ranks, forked from this process: Paddle is loaded already, so that takes half a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as ready
from typing import Any

from erniekit.base.ports import free_port
from erniekit.base.runtime import Place
from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh, open_mesh


def run_ranks(function: Callable[..., Any], layout: Layout, *arguments: Any, seconds: float = 60) -> list[Any]:
    """What `function(mesh, *arguments)` returns on every rank, in rank order; results must be picklable.

    Raises AssertionError with the traceback of the first rank that failed, or if not all are done in time.
    """
    return run_places(_in_mesh, layout.world, function, layout, *arguments, seconds=seconds)


def _in_mesh(place: Place, function: Callable[..., Any], layout: Layout, *arguments: Any) -> Any:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mesh = open_mesh(layout, place)
    found = function(mesh, *arguments)
    mesh.close()
    return found


def run_places(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 60) -> list[Any]:
    """The same for `function(place, *arguments)`, which opens the mesh itself."""
    return Started(function, world, *arguments).results(seconds)


class Started:
    """Ranks at work in the background."""

    def __init__(self, function: Callable[..., Any], world: int, *arguments: Any) -> None:
        context, master = multiprocessing.get_context("fork"), f"127.0.0.1:{free_port()}"
        self._pipes: dict[Connection, int] = {}
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            place = Place(rank, world, master)
            process = context.Process(target=_work, args=(theirs, function, place, arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes[ours] = rank
            self._processes.append(process)

    def results(self, seconds: float = 60) -> list[Any]:
        """See `run_ranks`; they have so many seconds from now."""
        try:
            return _gathered(self._pipes, deadline=time.monotonic() + seconds)
        finally:
            self.stop(patience=2)

    def stop(self, *, patience: float = 0) -> None:
        """End whoever still works."""
        for process in self._processes:
            process.join(patience)
            if process.is_alive():
                process.kill()


def _work(pipe: Connection, function: Callable[..., Any], place: Place, arguments: tuple) -> None:
    try:
        result = (True, function(place, *arguments))
    except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
        result = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    os._exit(0)  # the parent's exit handlers are not ours


def _gathered(pipes: dict[Connection, int], *, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = [pipe for pipe, rank in pipes.items() if rank not in found]
        arrived = ready(waiting, timeout=max(deadline - time.monotonic(), 0))
        assert arrived, f"ranks {[pipes[pipe] for pipe in waiting]} are not done in time"
        for pipe in arrived:
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process ended without a word"
            assert good, f"rank {pipes[pipe]}:\n{value}"
            found[pipes[pipe]] = value
    return [found[rank] for rank in sorted(found)]


def axis_of(mesh: Mesh, name: str) -> list[int]:
    """The ranks of this rank's group along an axis."""
    return list(mesh.axis(name).ranks)
