"""A run of several ranks, from its config to the model folder, is the run of one process with the rows of all."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from erniekit.checkpoint.manifest import check_manifest
from erniekit.recipes import train
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked

COUNTS = ("step", "tokens", "trained_tokens", "eval_tokens", "eval_samples")
FIGURES = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "margin", "accuracy", "kl", "aux_loss", "eval_margin")


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


def test_a_rank_that_tokenises_for_long_holds_nobody_up(bench: Bench, tmp_path: Path) -> None:
    def pause(rank: int) -> None:
        from erniekit.training import session

        build = session.build_train_data

        def build_train_data(*args, **kwargs):
            time.sleep(0 if rank else 40)  # gloo gives up after 30
            return build(*args, **kwargs)

        session.build_train_data = build_train_data

    config = bench.config(tmp_path / "out", max_steps=1, save_strategy="no", eval_dataset_path=None)
    started = time.monotonic()
    assert run_ranked(config, 2, {}, prepare=pause, seconds=120) == ["", ""]
    assert time.monotonic() - started > 40


@pytest.mark.parametrize("what", ["config", "content of the data"])
def test_ranks_that_differ_are_refused(bench: Bench, tmp_path: Path, what: str) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text((bench.folder / "train.jsonl").read_text().replace("red", "tree"))

    def differ(rank: int) -> None:
        from erniekit.training import ranks, session

        if rank == 1 and what == "config":
            digest = ranks.config_digest
            ranks.config_digest = lambda cfg: digest(cfg)[::-1]
        elif rank == 1:
            build = session.build_train_data
            session.build_train_data = lambda data, *args, **kwargs: build(
                dataclasses.replace(data, train_dataset_path=[str(other)]), *args, **kwargs
            )

    config = bench.config(tmp_path / "out", max_steps=1, eval_dataset_path=None)
    for said in run_ranked(config, 2, {}, prepare=differ):
        assert said.startswith(f"MeshError: the {what} differs between ranks: 1 have another one than rank 0."), said
    assert not (tmp_path / "out").exists()


def test_what_rank_0_finds_wrong_ends_all(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    config = bench.config(tmp_path / "out", max_steps=1)
    first, second = run_ranked(config, 2, {})
    assert first.startswith("ConfigError: output_dir") and "thesis.txt" in first
    assert second.partition(":")[2] == first.partition(":")[2] and second.startswith("MeshError: ")
