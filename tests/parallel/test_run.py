"""A run of several ranks, from its config to the model folder, is the run of one process with the rows of all."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from erniekit.checkpoint.manifest import check_manifest
from erniekit.recipes import train
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked, start_ranked
from tests.parallel.ranks import Started

WORKS = ("tokenising", "saving", "evaluating")
PAUSE = 40  # seconds; gloo gives up after 30
COUNTS = ("step", "tokens", "trained_tokens", "eval_tokens", "eval_samples")
FIGURES = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "margin", "accuracy", "kl", "aux_loss", "eval_margin")


def pause(rank: int, work: str, done: Path) -> None:
    """Let one rank be slow at something."""
    from erniekit.training import evaluate, session, state

    slow, owner, name = {
        "tokenising": (0, session, "build_train_data"), "saving": (0, state, "write_manifest"),
        "evaluating": (1, evaluate, "score"),
    }[work]  # fmt: skip
    quick = getattr(owner, name)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        time.sleep(PAUSE)
        done.write_text(f"{time.monotonic() - started}")
        return quick(*args, **kwargs)

    if rank == slow:
        setattr(owner, name, slowly)


@pytest.fixture(scope="module", autouse=True)
def pauses(
    request: pytest.FixtureRequest, bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Started, Path]]]:
    """Runs with a long pause, which go on beside the other tests here; the last ones of this file wait for them."""
    started: dict[str, tuple[Started, Path]] = {}
    if any(test_a_pause_holds_nobody_up.__name__ in item.name for item in request.session.items):
        for work in WORKS:
            folder = tmp_path_factory.mktemp(work)
            prepare = functools.partial(pause, work=work, done=folder / "paused")
            config = bench.config(folder / "out", max_steps=1, max_evaluate_steps=1, eval_steps=1)
            started[work] = start_ranked(config, 2, {"evaluation_strategy": "steps"}, prepare=prepare), folder
    yield started
    for ranks, _ in started.values():
        ranks.stop()


def assert_same_log(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The figures of two runs, up to the last bits of sums."""
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        assert mine.keys() == its.keys()
        assert {name: mine[name] for name in COUNTS if name in mine} == {n: its[n] for n in COUNTS if n in its}
        for name in set(FIGURES) & set(its):
            assert mine[name] == pytest.approx(its[name], rel=2e-5, abs=1e-6), (name, mine, its)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_two_ranks_train_as_one_process(bench: Bench, tmp_path: Path) -> None:
    config = bench.config(tmp_path / "one", evaluation_strategy="steps", eval_steps=3, per_device_eval_batch_size=5)
    train(config, batch_size=4, per_device_eval_batch_size=10)
    assert run_ranked(config, 2, {"output_dir": tmp_path / "two"}) == ["", ""]
    assert_same_log(log_of(tmp_path / "two"), log_of(tmp_path / "one"))
    assert not check_manifest(tmp_path / "two" / "checkpoint-6")
    mine, its = tensors(tmp_path / "two" / "checkpoint-6"), tensors(tmp_path / "one" / "checkpoint-6")
    for name, array in its.items():
        np.testing.assert_allclose(mine[name], array, atol=2e-5, err_msg=name)


def test_a_resumed_run_of_two_ranks_is_bit_equal(bench: Bench, tmp_path: Path) -> None:
    config = bench.config(tmp_path / "whole")
    assert run_ranked(config, 2, {}) == ["", ""]

    def interrupt(rank: int) -> None:
        """Rank 1 is told to stop while its second step is under way, and none else."""
        from erniekit.training import loop

        taken, step = [], loop.train_step

        def train_step(*args, **kwargs):
            taken.append(1)
            if rank == 1 and len(taken) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        loop.train_step = train_step

    found = run_ranked(config, 2, {"output_dir": tmp_path / "cut"}, prepare=interrupt)
    assert found == ["AskedToStop: ", "AskedToStop: "]
    assert [path.name for path in sorted((tmp_path / "cut").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    assert run_ranked(config, 2, {"output_dir": tmp_path / "cut"}) == ["", ""]
    names = ["model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/training/optimizer.safetensors"]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    losses = [[row["loss"] for row in log_of(tmp_path / out) if "loss" in row] for out in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def spoil(model: Path, folder: Path, *, name: str) -> Path:
    """A copy of a model whose file `name` is another."""
    shutil.copytree(model, folder)
    if name == "model.safetensors":
        stored = load_file(folder / name)
        first = sorted(stored)[0]
        stored[first][..., 0] += 1
        save_file(stored, folder / name, metadata={"format": "pt"})
    else:
        (folder / name).write_text((folder / name).read_text() + "\n")
    return folder


@pytest.mark.parametrize(("what", "told"), [
    ("config", r"learning_rate is 0\.001 on rank 0, 0\.002 on rank 1; tensor_parallel_degree is -1 on rank 0, 2 on"),
    ("content of the data", r"file 1, train\.jsonl, is \w{12} on rank 0, \w{12} on rank 1; the order of rows is"),
    ("tokenizer_config.json", r"the model differs between ranks: tokenizer is \w{12} on rank 0, \w{12} on rank 1\. "),
    ("model.safetensors", r"the model differs between ranks: weights is \w{12} on rank 0, \w{12} on rank 1\. "),
], ids=["config", "data", "tokenizer", "model"])  # fmt: skip
def test_ranks_that_differ_are_refused(bench: Bench, tmp_path: Path, what: str, told: str) -> None:
    rows = (bench.folder / "train.jsonl").read_text().replace("red", "tree")
    other = tmp_path / "train.jsonl"  # what is at the same place on rank 1's machine
    other.write_text(rows)
    model = spoil(bench.model, tmp_path / "model", name=what) if "." in what else bench.model

    def differ(rank: int) -> dict[str, Any]:
        from erniekit.training import session

        if rank == 0:
            return {}
        session.locate_model = lambda *_: model
        if what == "config":
            return {"learning_rate": 2e-3, "tensor_parallel_degree": 2}
        if "data" in what:
            build = session.build_train_data
            session.build_train_data = lambda data, *args, **kwargs: build(
                dataclasses.replace(data, train_dataset_path=[str(other)]), *args, **kwargs
            )
        return {}

    config = bench.config(tmp_path / "out", max_steps=1, eval_dataset_path=None)
    for said in run_ranked(config, 2, {}, prepare=differ):
        assert said.startswith("MeshError: the ") and " differs between ranks: " in said and re.search(told, said), said
    assert not (tmp_path / "out").exists()


def test_what_rank_0_finds_wrong_ends_all(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    config = bench.config(tmp_path / "out", max_steps=1)
    first, second = run_ranked(config, 2, {})
    assert first.startswith("ConfigError: output_dir") and "thesis.txt" in first
    assert second.partition(":")[2] == first.partition(":")[2] and second.startswith("MeshError: ")


@pytest.mark.parametrize("work", WORKS)
def test_a_pause_holds_nobody_up(pauses: dict[str, tuple[Started, Path]], work: str) -> None:
    ranks, folder = pauses[work]
    assert ranks.results(seconds=2 * PAUSE + 60) == ["", ""]
    assert float((folder / "paused").read_text()) >= PAUSE
    assert (folder / "out" / "model.safetensors").is_file()
