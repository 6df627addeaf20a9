"""Ports of this machine on which a process can listen."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that nobody has now. Somebody may have it by the time that it is used: better is `hold_port`."""
    with hold_port() as held:
        return held.getsockname()[1]


def hold_port(port: int = 0) -> socket.socket:
    """A socket bound to `port`, or to any that is free (0): as long as it is open the system gives the port to nobody
    who wants any, but a process that knows the number and reuses addresses may listen there. It does not listen itself:
    who knocks would take it for that process. Raises OSError if somebody has the port."""
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", port))
    except OSError:
        held.close()
        raise
    return held
