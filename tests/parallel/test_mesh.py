"""Ranks come up, meet, share, agree, and say what is wrong with each other."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import paddle
import pytest

from erniekit.base.errors import MeshError
from erniekit.base.ports import free_port
from erniekit.base.runtime import Place
from erniekit.config.layout import Layout
from erniekit.parallel import mesh as mesh_module
from erniekit.parallel import store
from erniekit.parallel.mesh import Mesh, open_mesh
from erniekit.parallel.pulse import read_beats
from tests.parallel.ranks import run_ranks


def talk(mesh: Mesh) -> dict[str, Any]:
    if mesh.rank == 1:
        time.sleep(0.5)  # the others must not go on without it
    before = time.time()
    mesh.meet("slow")
    met = time.time()
    said = {"rank": mesh.rank, "text": "ä\n"}
    found = {
        "arrived": before,
        "met": met,
        "shared": [mesh.words.share("what", said), mesh.words.share("what", [mesh.rank])],
        "collected": mesh.words.collect("who", said),
        "first": mesh.first,
        "coordinates": mesh.coordinates,
    }
    mesh.words.agree("the config", {"seed": "1"}, way_out="Start all ranks with one config.")
    try:
        known = [{"a": "x", "b": "1"}, {"a": "y", "b": "1"}, {"a": "y", "b": "1"}, {"a": "x", "c": "1"}][mesh.rank]
        mesh.words.agree("the data", known, way_out="See that all machines have the same files.")
    except MeshError as error:
        found["told"] = str(error)
    return found


def test_words_between_ranks() -> None:
    ranks = run_ranks(talk, Layout(4, tensor=2))
    said = [{"rank": rank, "text": "ä\n"} for rank in range(4)]
    latest = max(found["arrived"] for found in ranks)
    for rank, found in enumerate(ranks):
        assert found["met"] >= latest - 0.01 and found["arrived"] <= latest
        assert found["shared"] == [said[0], [0]]
        assert found["collected"] == said
        assert found["first"] == (rank == 0)
        assert found["coordinates"] == Layout(4, tensor=2).coordinates(rank)
        assert found["told"] == (
            "the data differs between ranks: a is x on rank 0, y on rank 1, 2; b is 1 on rank 0, absent on rank 3; "
            "c is absent on rank 0, 1 on rank 3. See that all machines have the same files."
        )


# ---------------------------------------------------------------------- coming up
def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        master = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(MeshError, match=rf"rank 0 cannot listen on {master} \(Address already in use\)"):
            store.open_store(master, rank=0)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-machine.invalid"])
def test_a_master_that_cannot_be_reached(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("_PATIENCE", 0.3), ("_PATIENCE_WITH_NAMES", 0.3), ("_QUIET", 0.1)):
        monkeypatch.setattr(store, name, seconds)
    master = f"{host}:{free_port()}"
    with pytest.raises(MeshError, match=f"rank 1 cannot reach rank 0 at {master}"):
        store.open_store(master, rank=1)
    assert f"rank 1 still waits for rank 0 at {master}" in capsys.readouterr().err


def test_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PATIENCE", 1)
    for name in ("PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"):  # Paddle is told by these, and later tests must not be
        monkeypatch.setenv(name, "")
    with pytest.raises(MeshError, match=r"rank 0 has waited 1 seconds for ranks 1, 2 of 3\."):
        open_mesh(Layout(3), Place(0, 3, f"127.0.0.1:{free_port()}"))


def lose_the_first(mesh: Mesh) -> str:
    """Rank 0 leaves without a word; what the others are told."""
    mesh.meet("begin")
    if mesh.rank == 0:
        time.sleep(0.1)  # until the others wait
        return ""
    try:
        mesh.words._wait("meet/never#1", mesh.layout.world)
    except MeshError as error:
        return str(error)
    return "met nobody"


def test_the_first_rank_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mesh, "close", lambda _: None)
    ranks = run_ranks(lose_the_first, Layout(2))
    assert "rank 1: rank 0, at which all meet, is gone" in ranks[1]


def test_a_free_store_looks_on_if_somebody_took_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        taken, free = other.getsockname()[1], free_port()
        ports = iter([taken, taken, free])
        monkeypatch.setattr(store, "free_port", lambda: next(ports))
        _, address = store.open_free_store("127.0.0.1")
    assert address == f"127.0.0.1:{free}"


# ---------------------------------------------------------------------- what ranks note
def note(mesh: Mesh, folder: str) -> list[tuple]:
    assert isinstance(mesh, Mesh) and os.path.isdir(folder)
    with mesh.pulse.step(4):
        mesh.axis("world").all_reduce(paddle.ones([2]))
    mesh.meet("pause")
    beats = read_beats(folder, range(2))
    mesh.meet("read")
    return [(beat.rank, beat.step, beat.kind, beat.where, beat.inside, beat.number) for beat in beats.values()]


def test_ranks_note_collectives_and_meetings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_pulse(layout: Layout, place: Place) -> Mesh:
        return mesh_module.open_mesh(layout, Place(place.rank, place.world, place.master, pulse=str(tmp_path)))

    monkeypatch.setattr("tests.parallel.ranks.open_mesh", with_pulse)
    for beats in run_ranks(note, Layout(2), str(tmp_path)):
        for rank, beat in enumerate(beats):
            assert beat[:2] == (rank, 4) and beat[2] == "meet"
            assert beat[3:] in (("pause#1", False, 4), ("pause#1", True, 4), ("read#1", True, 5), ("read#1", False, 5))
    ends = read_beats(tmp_path, range(2))
    assert {(beat.kind, beat.where, beat.number) for beat in ends.values()} == {("meet", "close#1", 6)}
