"""What a run of several ranks decides and leaves: a kept step, the best model, a lock; one process looks into them."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from erniekit.base.errors import MeshError
from erniekit.checkpoint.manifest import check_manifest
from erniekit.recipes import train
from erniekit.recipes.replay import replay
from erniekit.recipes.reproduce import reproduce
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked


def losses(out: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in log_of(out) if name in row]


def same_tensors(one: Path, other: Path) -> bool:
    mine, its = (load_file(folder / "model.safetensors") for folder in (one, other))
    return mine.keys() == its.keys() and all((mine[name] == its[name]).all() for name in its)


def test_a_step_that_is_not_finite_stops_all_ranks_and_is_kept_whole(bench: Bench, tmp_path: Path) -> None:
    model, out = shutil.copytree(bench.model, tmp_path / "model"), tmp_path / "out"
    stored = load_file(model / "model.safetensors")
    (name,) = [name for name in stored if "layers.1.self_attn.o_proj" in name]
    stored[name].reshape(-1)[7] = 0x7FC0  # NaN in bfloat16
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    config = bench.config(out, model_name_or_path=model, eval_dataset_path=None)
    first, second = run_ranked(config, 2, {"expert_parallel_degree": 2})
    assert first == second and first.startswith("TrainingStopped: step 1: the loss is nan")
    folder = out / "replay" / "step-1"
    assert check_manifest(folder) == [] and [path.name for path in folder.parent.iterdir()] == ["step-1"]
    found = replay(folder)
    assert found and (found.layer, found.direction) == ("model.layers.1.self_attn.o_proj", "forward")


def test_a_spike_is_kept_with_the_rows_of_all_ranks(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(_rank: int) -> None:
        from erniekit.training.replay import StepKeeper

        StepKeeper.spike = lambda self, _loss: "a test wants it" if len(self._losses) == 1 else ""

    out = tmp_path / "out"
    config = bench.config(out, max_steps=2, save_steps=1, eval_dataset_path=None)
    assert run_ranked(config, 4, {"tensor_parallel_degree": 2}, prepare=prepare) == [""] * 4
    assert same_tensors(out / "replay" / "step-2", out / "checkpoint-1")
    capsys.readouterr()
    replay(out / "replay" / "step-2")
    shown = capsys.readouterr().out
    total, _, parts = shown.partition("its loss: ")[2].partition("\n")[0].partition("; of each micro-batch: ")
    assert float(total) == pytest.approx(losses(out)[1], rel=2e-5)
    assert len(parts.split(", ")) == 4, "two micro-batches of each data rank"


@pytest.mark.parametrize("keys", [{"sharding": "stage3"}, {"tensor_parallel_degree": 2}], ids=["weights", "tensor"])
def test_ranks_stop_together_and_end_with_the_best_model(bench: Bench, tmp_path: Path, keys: dict) -> None:
    def misjudge(rank: int) -> None:
        """Rank 1 finds that nothing gets better."""
        from erniekit.training.evaluate import Score

        figures = Score.figures
        if rank == 1:
            Score.figures = lambda self: {**figures(self), "eval_loss": 1.0}

    out = tmp_path / "out"
    config = bench.config(
        out, evaluation_strategy="steps", eval_steps=1, learning_rate="0.5", lr_scheduler_type="constant",
        early_stopping_patience=1, load_best_model_at_end=True, ema_decay=0.5, max_steps=12, save_steps=50,
        max_evaluate_steps=1,
    )  # fmt: skip
    assert run_ranked(config, 2, keys, prepare=misjudge) == ["", ""]
    measured = losses(out, "eval_loss")
    best = min(range(len(measured)), key=measured.__getitem__) + 1
    assert best + 1 == len(measured) < 12
    kept, final = (load_file(folder / "model.safetensors") for folder in (out / f"checkpoint-{best}", out))
    for name, array in final.items():
        in_fp32 = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
        np.testing.assert_allclose(in_fp32, kept[name], rtol=2**-8, atol=1e-30, err_msg=name)


def test_a_run_is_repeated_by_as_many_ranks(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = bench.config(out, max_steps=3, save_strategy="no", eval_dataset_path=None)
    assert run_ranked(config, 2, {"expert_parallel_degree": 2}) == ["", ""]
    again = functools.partial(reproduce, train=train, bound=0.0)
    assert run_ranked(out / "run.lock.yaml", 2, {"out": tmp_path / "again"}, recipe=again) == ["", ""]
    assert losses(tmp_path / "again") == losses(out) and same_tensors(tmp_path / "again", out)
    with pytest.raises(MeshError, match=r"its run was one of 2 ranks, this would be one of 1.*--nproc 2"):
        reproduce(out / "run.lock.yaml", train=train)
