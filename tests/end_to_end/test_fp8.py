"""FP8 training from the command line, emulated: what is refused, a run that was killed, one that goes astray, and what
is left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from erniekit.config.families import FAMILIES
from erniekit.precision.qat import QatTraining
from tests.end_to_end.conftest import Bench, write_rows

KEYS: dict[str, Any] = {"compute_type": "fp8", "fp8_emulate": "true", "apply_online_actscale_step": 2}
RECIPES = ("blockwise", "qat")
_ADAPTED = ("SFT", "DPO", "KTO")  # stages in which adapters are trained here
KILLED = """
import os, signal, sys
from erniekit.cli.main import main
from erniekit.training.fp8 import Fp8Training
taken = Fp8Training.after_update
def after_update(self):
    taken(self)
    self.steps = getattr(self, "steps", 0) + 1
    if self.steps == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Fp8Training.after_update = after_update
main(["train", sys.argv[1]])
"""
WORDS = ("red", "green", "blue", "one", "moon")
SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32}


@pytest.fixture(scope="module")
def wide(bench: Bench) -> Iterator[Bench]:
    """The micro model with sizes that blocks of 128 divide, and the same data."""
    from erniekit.checkpoint.create import create

    made = Bench(bench.folder / "wide")
    made.folder.mkdir()
    for name in ("train", "eval", "text"):
        shutil.copy(bench.folder / f"{name}.jsonl", made.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "micro-moe", {**FAMILIES["micro-moe"], **SIZES})
        create("micro-moe", made.model, tokenizer_texts=[made.folder / "train.jsonl"])
    yield made


@pytest.fixture(scope="module", params=RECIPES)
def whole(request: pytest.FixtureRequest, wide: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe, and what a run by it leaves that nobody disturbed."""
    from erniekit.recipes import train

    out = tmp_path_factory.mktemp("fp8") / request.param
    keys = {**KEYS, "fp8_recipe": request.param, "fp8_check_every": 3, "logging_steps": 2, "eval_steps": 3}
    train(wide.config(out, **keys))
    return request.param, out


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_s"} for line in lines]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fp8_emulate": "false"}, ("compute_type: fp8 needs GPUs", "fp8_emulate: true")),
        ({"fp8_recipe": "blockwise"}, ("model.layers.1.mlp.experts in blocks of 128", "moe_intermediate_size 32")),
        ({"fine_tuning": "LoRA", "sharding": "stage3"}, ("fine_tuning: LoRA", "sharding: stage3")),
        ({"fp8_recipe": "blockwise", "apply_hadamard": "true"}, ("fp8_recipe: blockwise", "apply_hadamard: true")),
    ],
    ids=["device", "sizes", "keys", "recipes"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bench, run, tmp_path, keys, said):
    out = tmp_path / "run"
    _, err = run("train", bench.config(out, **(KEYS | keys)), code=2)
    for words in said:
        assert words in err
    assert not out.exists()


def test_figures_of_casts_are_logged(whole):
    _, out = whole
    steps = [row for row in rows(out) if "loss" in row]
    assert [row["step"] for row in steps if "fp8_amax" in row] == [2, 4, 6]
    assert [row["step"] for row in steps if "fp8_off" in row] == [3, 6]
    assert all(row["fp8_amax"] > 0 and 0 <= row["fp8_underflow"] < 0.5 for row in steps if "fp8_amax" in row)
    assert all(0.01 < row["fp8_off"] < 0.1 for row in steps if "fp8_off" in row)
    lock = (out / "run.lock.yaml").read_text(encoding="utf-8")
    assert "fp8_recipe: " in lock and "fp8_emulate: true" in lock


def test_kill_9_and_the_same_command(whole, wide, run, tmp_path):
    """Killed when the fourth step has moved the weights and is not logged; the third goes by kept scales, too."""
    recipe, out = whole
    config = wide.config(tmp_path / "cut", **KEYS, fp8_recipe=recipe, fp8_check_every=3, logging_steps=2, eval_steps=3)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(config)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    told, _ = run("train", config)
    assert "step 3/6" not in told and "step 4/6" in told
    assert rows(tmp_path / "cut") == rows(out)
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/training/optimizer.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (out / name).read_bytes(), name
    assert (out / "checkpoint-6" / "training" / "memory.safetensors").is_file() == (recipe == "qat")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_that_is_not_finite_is_kept_and_its_module_named(wide, run, tmp_path, monkeypatch, recipe):
    from erniekit.training import loop

    take = loop.train_step

    def train_step(model, optimizer, **keys):
        if optimizer.num_steps == 1:
            with paddle.no_grad():
                model.model.layers[1].mlp.experts.down_proj[1, 3, 5] = float("nan")
        return take(model, optimizer, **keys)

    monkeypatch.setattr(loop, "train_step", train_step)
    _, err = run("train", wide.config(tmp_path / "out", **KEYS, fp8_recipe=recipe, save_steps=1), code=2)
    assert "step 2: the loss is nan" in err and "checkpoint-1 stands" in err
    assert err.count("warning: the weight of model.layers.1.mlp.experts.down_proj holds NaN or infinity") == 1
    monkeypatch.undo()
    loaded, load = {}, QatTraining.load_state
    monkeypatch.setattr(QatTraining, "load_state", lambda self, state: load(self, loaded.update(state) or state))
    shown, _ = run("replay", tmp_path / "out" / "replay" / "step-2")
    saved = tmp_path / "out" / "checkpoint-1" / "training" / "memory.safetensors"
    found = load_file(saved) if recipe == "qat" else {}
    assert loaded.keys() == found.keys() and all(np.array_equal(loaded[name], array) for name, array in found.items())
    assert "step 2 was kept: the loss is nan" in shown
    assert "the weight of model.layers.1.mlp.experts.down_proj holds NaN" in shown.partition("\n")[0]


def test_the_export_is_a_plain_model(whole, wide, run, tmp_path):
    recipe, out = whole
    config = wide.config(out, **KEYS, fp8_recipe=recipe)
    run("export", config)
    run("verify", out / "export")
    exported, base = (load_file(folder / "model.safetensors") for folder in (out / "export", wide.model))
    assert {name: array.shape for name, array in exported.items()} == {name: a.shape for name, a in base.items()}
    assert any(not np.array_equal(exported[name], base[name]) for name in base)
    told, _ = run("eval", config, f"model_name_or_path={out / 'export'}")
    assert "eval_loss" in told


def better(number: int) -> dict[str, Any]:
    """A question with an answer that repeats it, and one that does not."""
    return {"question": f"say {WORDS[number % 4]}", "chosen": WORDS[number % 4], "rejected": f"never {WORDS[-1]}"}


@pytest.mark.parametrize(
    "keys",
    [
        *({"stage": stage, "fp8_recipe": recipe} for stage in ("DPO", "KTO", "RM") for recipe in RECIPES),
        *({"stage": stage, "fp8_recipe": "blockwise", "fine_tuning": "LoRA", "lora_rank": 4} for stage in _ADAPTED),
    ],
    ids=lambda keys: " ".join([keys["stage"], keys["fp8_recipe"], *(["LoRA"] if "fine_tuning" in keys else [])]),
)
def test_other_stages_and_adapters_train(wide, run, tmp_path, keys):
    """Near fp32's first figures, and not on them. Adapters are merged into the base as it was."""
    pairs = {"train_dataset_type": None, "train_dataset_path": write_rows(tmp_path / "p.jsonl", map(better, range(16)))}
    data = {"eval_dataset_path": None, "max_steps": 2, "fp8_check_every": 1, "logging_steps": 1}
    if keys["stage"] != "SFT":
        data |= {**pairs, "check_leaks": "false"}
    run("train", wide.config(tmp_path / "fp8", **{**KEYS, **data, **keys}))
    given = {name: value for name, value in {**data, **keys}.items() if not name.startswith("fp8_")}
    run("train", wide.config(tmp_path / "fp32", **given, compute_type="fp32"))
    found, plain = rows(tmp_path / "fp8"), rows(tmp_path / "fp32")
    assert len(found) == 2 and all(0.01 < row["fp8_off"] < 0.1 for row in found)
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(plain[0][name], rel=0.1)
    assert found[0]["grad_norm"] != plain[0]["grad_norm"] and found[1]["loss"] != found[0]["loss"]
    if "fine_tuning" in keys:
        assert (tmp_path / "fp8" / "adapter_model.safetensors").is_file()
        run("export", wide.config(tmp_path / "fp8", **{**KEYS, **data, **keys}))
        exported, base = (load_file(at / "model.safetensors") for at in (tmp_path / "fp8" / "export", wide.model))
        moved = {name for name in base if not np.array_equal(exported[name], base[name])}
        assert "model.layers.0.mlp.down_proj.weight" in moved and "model.embed_tokens.weight" not in moved
