"""A run of preferences goes on under another layout: its optimizer and averages, which evaluation was the best and the
checkpoint that it left, the limit of checkpoints, the reference's table."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.create import create
from erniekit.checkpoint.folder import Folder
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.parallel.mesh import Mesh
from erniekit.recipes import train
from erniekit.training.weights import weights_of
from tests.end_to_end.conftest import Bench, write_rows
from tests.parallel.launched import log_of, run_ranked
from tests.parallel.ranks import run_ranks
from tests.parallel.test_run import assert_same_log

WORDS = ("red", "green", "blue", "one", "two", "three", "four", "up", "down", "left", "moon", "sun", "tree")
TENSOR = {"tensor_parallel_degree": 2, "use_async_save": True}
STATES = "checkpoint-6/training/optimizer.safetensors"


def pair(number: int) -> dict[str, str]:
    """A prompt whose better answer repeats it."""
    a, b, c = (WORDS[number * factor % 13] for factor in (1, 3, 5))
    return {"question": f"say {a} and {b} and {c}", "chosen": f"{a} {b} {c}", "rejected": f"never {c}"}


@pytest.fixture(scope="module")
def config_of(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Writes the config of a run that ends with its worst evaluation, the first: it has to be kept and found."""
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "train.jsonl", [pair(n) for n in range(1, 60)])
    write_rows(folder / "eval.jsonl", [pair(n) for n in range(90, 96)])
    return lambda out: bench.config(
        out, stage="DPO", compute_type="fp32", train_dataset_type=None, train_dataset_path=folder / "train.jsonl",
        eval_dataset_path=folder / "eval.jsonl", check_leaks=False, evaluation_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, greater_is_better=True, save_total_limit=1, save_steps=1, ema_decay=0.5,
        data_cache_dir=out.parent / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config_of: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never stopped."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(config_of(out))
    return out


def stop_at_the_fourth_step(_rank: int) -> None:
    """Every rank is told so in the middle of it."""
    from erniekit.training import loop

    taken, step = [], loop.train_step

    def train_step(*args, **kwargs):
        taken.append(1)
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    loop.train_step = train_step


@pytest.mark.parametrize("lives", [((1, {}), (2, TENSOR)), ((2, TENSOR), (1, {}))], ids=["one, two", "two, one"])
def test_a_run_goes_on_under_another_layout(
    lives: tuple, config_of: Callable[[Path], Path], alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config, (first, second) = config_of(out), lives
    said = run_ranked(config, first[0], first[1], prepare=stop_at_the_fourth_step)
    assert said == ["AskedToStop: "] * first[0]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    tables = list((tmp_path / "cache").rglob("*.npz"))
    made = [path.stat().st_ino for path in tables]
    assert run_ranked(config, second[0], {**second[1], "resume_anyway": True}) == [""] * second[0]
    assert len(made) == 1 and [path.stat().st_ino for path in tables] == made  # not made again
    assert_same_log(log_of(out), log_of(alone))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    mine, its = load_file(out / STATES), load_file(alone / STATES)
    assert mine.keys() == its.keys() and any(name.endswith(".ema") for name in its)
    for name, array in its.items():
        np.testing.assert_allclose(mine[name], array, atol=2e-5, rtol=1e-3, err_msg=name)
    best, left = load_file(out / "checkpoint-2" / "model.safetensors"), Folder.open(out)
    for name, array in best.items():
        rounded = array.astype(ml_dtypes.bfloat16) if left.tag(name) != "F32" else array
        stored = load_file(out / "model.safetensors")[name]
        assert stored.tobytes() == rounded.tobytes(), name


def built(mesh: Mesh, config: Path, checkpoint: Path) -> str:
    """What a rank hears that goes on from a checkpoint."""
    cfg = load_config(config, ["tensor_parallel_degree=2"])
    base = Folder.open(str(cfg.model.model_name_or_path))
    assert Cut.of(mesh.layout, mesh.rank).layout.tensor == 2
    try:
        weights_of(cfg, base, base.config, mesh).build(checkpoint)
    except CheckpointError as error:
        return str(error)
    return "built"


def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(
    config_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    create("micro-dense", tmp_path / "dense")
    first, second = run_ranks(built, Layout(2, tensor=2), config_of(tmp_path / "out"), tmp_path / "dense")
    assert first == second
    assert str(tmp_path / "dense") in first and "is wanted and not stored" in first
