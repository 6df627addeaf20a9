"""Ports: what is held is kept from others and heard by nobody until its owner listens."""

from __future__ import annotations

import socket

import pytest

from erniekit.base.ports import free_port, hold_port


def test_a_held_port_is_for_who_reuses_it_alone():
    with hold_port() as held:
        port = held.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):  # who knocks is not deceived
            socket.create_connection(("127.0.0.1", port), timeout=5)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        with hold_port(port) as owner:
            owner.listen(1)
            socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_port_on_which_somebody_listens_is_not_held():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        hold_port(other.getsockname()[1])


def test_a_free_port_is_free():
    socket.create_server(("", free_port())).close()
