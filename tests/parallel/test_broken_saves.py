"""Saves that go wrong on one rank: all ranks stop with one message, and the last checkpoint stands."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint import together
from erniekit.checkpoint.manifest import check_manifest
from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh
from erniekit.recipes import train
from erniekit.training import loop, state
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked
from tests.parallel.ranks import run_ranks
from tests.parallel.test_saving import digests

TENSOR = {"tensor_parallel_degree": 2, "evaluation_strategy": "no", "eval_dataset_path": None}


def at_the_second_save(rank: int, happens: Callable[[], None]) -> Callable[[int], None]:
    """What to prepare so that something happens to a rank when it writes its part of checkpoint-4; the fifth step is
    slow enough for it to be over then."""

    def prepare(this: int) -> None:
        write, step, taken = together._write_pieces, loop.train_step, []

        def train_step(*args: Any, **kwargs: Any) -> Any:
            taken.append(1)
            time.sleep(1.5 if len(taken) == 5 else 0)
            return step(*args, **kwargs)

        def write_pieces(path: Path, *others: Any) -> None:
            if this == rank and "checkpoint-4" in str(path):
                happens()
            write(path, *others)

        together._write_pieces, loop.train_step = write_pieces, train_step

    return prepare


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def require_goes_on(bench: Bench, out: Path) -> None:
    """Raise AssertionError unless the one checkpoint is whole and one process goes on from it to the end."""
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not check_manifest(out / "checkpoint-2")
    train(bench.config(out, **TENSOR, resume_anyway=True), tensor_parallel_degree=1)
    assert not [path.name for path in out.glob(".*.tmp")]
    assert [row["step"] for row in log_of(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_of_one_rank_ends_all_with_one_message(bench: Bench, tmp_path: Path, *, background: bool) -> None:
    out = tmp_path / "out"
    config = bench.config(out, **TENSOR, use_async_save=background)
    said = run_ranked(config, 2, {}, prepare=at_the_second_save(1, disk_is_full))
    assert said[0] == said[1]
    assert said[0].startswith("CheckpointError: ") and said[0].count("the disk is full") == 1, said
    assert log_of(out)[-1]["step"] == 4 + background  # told at the next step, not at the next save
    assert [path.name for path in out.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_is_killed_while_it_saves(bench: Bench, tmp_path: Path, *, background: bool) -> None:
    out = tmp_path / "out"
    config = bench.config(out, **TENSOR, use_async_save=background)
    with pytest.raises(AssertionError, match="rank 1:\nthe process ended without a word"):
        run_ranked(config, 2, {}, prepare=at_the_second_save(1, is_killed))
    require_goes_on(bench, out)


def test_what_nobody_expected_in_the_background_is_not_lost(bench: Bench, tmp_path: Path) -> None:
    def fails() -> None:
        raise ZeroDivisionError("a mistake of ours")

    config = bench.config(tmp_path / "out", **TENSOR, use_async_save=True)
    with pytest.raises(AssertionError, match=r"(?s)rank 1:\n.*ZeroDivisionError: a mistake of ours"):
        run_ranked(config, 2, {}, prepare=at_the_second_save(1, fails))
    assert log_of(tmp_path / "out")[-1]["step"] == 5


def speechless(mesh: Mesh, folder: Path) -> str:
    """Write together where rank 1 has no room for a word, from the second one on."""
    atomic_write, words = together.atomic_write, []

    def write(path: Path, content: bytes) -> None:
        words.append(path)
        if mesh.rank == 1 and len(words) > 1:
            raise CheckpointError(f"{path.name}: the disk is full")
        atomic_write(path, content)

    together.atomic_write = write
    stage = together.SharedStage(mesh, lambda: state._unpublished(folder / "checkpoint-1"))
    with stage:
        stage.notes.collect("first", mesh.rank)
        stage.notes.collect("second", mesh.rank)
    try:
        stage.settle()
    except CheckpointError as error:
        return str(error)
    return "placed"


def test_a_disk_without_room_for_a_word_keeps_nobody_waiting(tmp_path: Path) -> None:
    said = run_ranks(speechless, Layout(2, tensor=2), tmp_path, seconds=20)
    assert said[0] == said[1]
    assert "rank 1 cannot write there" in said[0] and "the disk is full" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_while_a_checkpoint_is_written(bench: Bench, tmp_path: Path) -> None:
    def wait_for_a_step(rank: int) -> None:
        """Rank 1 writes its part of checkpoint-2 when step 3 is taken, which it never is if saving holds it up."""
        write, step, taken = together._write_pieces, loop.train_step, threading.Semaphore(0)

        def write_pieces(path: Path, *others: Any) -> None:
            for _ in range(3 if rank and path.name == "model.safetensors" and "checkpoint-2" in str(path) else 0):
                taken.acquire()
            write(path, *others)

        def train_step(*args: Any, **kwargs: Any) -> Any:
            made = step(*args, **kwargs)
            taken.release()
            return made

        together._write_pieces, loop.train_step = write_pieces, train_step

    found = {}
    for background in (False, True):
        config = bench.config(tmp_path / str(background), **TENSOR, use_async_save=background, max_steps=4)
        assert run_ranked(config, 2, {}, prepare=wait_for_a_step if background else lambda _: None) == ["", ""]
        found[background] = [digests(tmp_path / str(background) / f"checkpoint-{step}") for step in (2, 4)]
    for mine, its in zip(found[True], found[False], strict=True):
        numbers = [name for name in its if name.endswith(".safetensors")]
        assert len(numbers) == 2
        assert [mine[name] for name in numbers] == [its[name] for name in numbers]
