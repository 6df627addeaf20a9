"""A reward model through the command line: trained on pairs, resumed, measured, refused where words are wanted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_for_answers
from erniekit.checkpoint.model_io import build_model
from tests.end_to_end.conftest import write_rows

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "up", "down", "left", "moon", "sun", "tree"]


def pair(number):
    """The better answer repeats the words asked for, the worse one says others."""
    rng = np.random.default_rng(number)
    asked, others = rng.permutation(WORDS)[:6].reshape(2, 3)
    return {"src": [f"say {' and '.join(asked)}"], "tgt": [], "response": [[" ".join(asked)], [" ".join(others)]],
            "sort": [1, 0]}  # fmt: skip


@pytest.fixture(scope="module")
def keys(bench):
    return {
        "stage": "RM", "train_dataset_path": write_rows(bench.folder / "pairs.jsonl", map(pair, range(64))),
        "eval_dataset_path": write_rows(bench.folder / "pairs-eval.jsonl", map(pair, range(1000, 1016))),
        "max_steps": 6, "save_steps": 3, "evaluation_strategy": "steps", "eval_steps": 3, "batch_size": 4,
        "lr_scheduler_type": "constant",
    }  # fmt: skip


@pytest.fixture(scope="module")
def reward_model(bench, keys, tmp_path_factory):
    """The folder of a finished run; not to be changed."""
    from erniekit.cli.main import main

    out = tmp_path_factory.mktemp("rewards") / "out"
    assert main(["train", str(bench.config(out, **keys))]) == 0
    return out


def history(out):
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_reward_model_and_its_figures(reward_model, run):
    folder = Folder.open(reward_model)
    assert folder.config.is_reward
    assert folder.layout == "paddle"
    assert folder.read_atom("score.weight").shape == (1, folder.config.hidden_size)
    assert not [name for name in folder.names if "lm_head" in name or "mtp" in name]
    config = json.loads((reward_model / "config.json").read_bytes())
    assert (config["architectures"], config["num_labels"]) == (["Ernie4_5_MoeForSequenceClassification"], 1)
    steps = [row for row in history(reward_model) if "loss" in row]
    assert {"rewards_chosen", "rewards_rejected", "margin", "accuracy"} <= steps[0].keys()
    assert [row["step"] for row in history(reward_model) if "eval_accuracy" in row] == [3, 6]
    run("verify", reward_model)


def test_a_resumed_run_ends_bit_equal(reward_model, bench, keys, tmp_path, run):
    out = tmp_path / "out"
    run("train", bench.config(out, **keys), "max_steps=3")
    run("train", bench.config(out, **keys))
    files = [path.relative_to(reward_model) for path in (reward_model / "checkpoint-6").rglob("*.safetensors")]
    assert len(files) == 2  # the weights, and the optimizer's state
    for path in files:
        assert (reward_model / path).read_bytes() == (out / path).read_bytes(), path


def test_eval_gives_the_accuracy_on_pairs(reward_model, bench, keys, tmp_path, run):
    """Measured from the saved model, which is rounded to bfloat16."""
    rows = {name: keys[name] for name in ("stage", "eval_dataset_path", "batch_size")}
    out, _ = run("eval", bench.config(tmp_path / "out", **rows, model_name_or_path=reward_model))
    found = json.loads((tmp_path / "out" / "eval" / "metrics.json").read_bytes())
    last = [row for row in history(reward_model) if "eval_accuracy" in row][-1]
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=0.02)
    assert found["eval_samples"] == 16
    assert "eval_accuracy" in out


def test_a_reward_model_goes_on_learning_rewards(reward_model, bench, keys, tmp_path, run):
    out = tmp_path / "out"
    changes = {**keys, "model_name_or_path": reward_model, "max_steps": 1, "learning_rate": "0.0", "eval_steps": 1}
    run("train", bench.config(out, **changes, save_layout="pt"))
    before, after = Folder.open(reward_model), load_file(out / "model.safetensors")
    np.testing.assert_array_equal(after["score.weight"], before.read_atom("score.weight"))


@pytest.mark.parametrize("stage", ["SFT", "DPO"])
def test_it_is_no_base_of_a_language_model(reward_model, bench, keys, tmp_path, run, stage):
    changes = {} if stage == "SFT" else {**keys, "stage": stage}
    _, err = run("train", bench.config(tmp_path / "out", **changes, model_name_or_path=reward_model), code=2)
    assert f"is a reward model: it has a score and no language model's head, so stage {stage} cannot" in err


def test_it_says_nothing(reward_model, bench, tmp_path, run):
    _, err = run("chat", bench.config(tmp_path / "out", model_name_or_path=reward_model), code=2)
    assert "is a reward model: it gives an answer a number and says nothing" in err


def test_measures_and_models_must_fit(reward_model, bench, keys, tmp_path, run):
    _, err = run("eval", bench.config(tmp_path / "a", model_name_or_path=reward_model), code=2)
    assert "is a reward model; it is measured on pairs: set stage: RM" in err
    rows = {name: keys[name] for name in ("stage", "eval_dataset_path")}
    _, err = run("eval", bench.config(tmp_path / "b", **rows), code=2)
    assert "is a language model; stage RM measures a reward model" in err
    _, err = run("eval", bench.config(tmp_path / "c", **{**rows, "stage": "DPO"}), code=2)
    assert "stage DPO compares a model with its reference" in err


def test_a_language_model_is_measured_on_pairs_without_a_reference(bench, keys, tmp_path, run):
    rows = {"stage": "DPO", "loss_type": "simpo", "eval_dataset_path": keys["eval_dataset_path"]}
    out, _ = run("eval", bench.config(tmp_path / "out", **rows))
    assert "eval_accuracy" in out


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_an_adapter_with_its_score(bench, keys, tmp_path, run, layout):
    """LoRA trains the score whole beside the adapters, in either form; a resumed run ends bit-equal."""
    changes = {**keys, "fine_tuning": "LoRA", "lora_rank": 4, "save_layout": layout}
    run("train", bench.config(tmp_path / "out", **changes), "max_steps=3")
    run("train", bench.config(tmp_path / "out", **changes))
    run("train", bench.config(tmp_path / "whole", **changes))
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out" / "checkpoint-6").rglob("*.safetensors")]
    assert len(files) == 2
    for path in files:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    adapter = AdapterFolder.open(tmp_path / "out")
    assert adapter.config.is_reward
    model = load_for_answers(bench.model, adapter=tmp_path / "out")
    trained = load_file(tmp_path / "out" / "checkpoint-6" / "adapter_model.safetensors")
    score = trained["base_model.model.score.weight"].T
    np.testing.assert_allclose(model.score.weight.numpy(), score, rtol=2**-8)
    assert np.abs(score - drawn_score(bench)).max() > 1e-4
    measured = {name: keys[name] for name in ("stage", "eval_dataset_path", "batch_size")}
    run("eval", bench.config(tmp_path / "eval", **measured, fine_tuning="LoRA", lora_path=tmp_path / "out"))
    found = json.loads((tmp_path / "eval" / "eval" / "metrics.json").read_bytes())
    last = [row for row in history(tmp_path / "whole") if "eval_accuracy" in row][-1]
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=0.02)
    _, err = run("export", bench.config(tmp_path / "merged", **{**changes, "output_dir": tmp_path / "out"}), code=2)
    assert "such an adapter is not merged in this version" in err
    _, err = run("chat", tmp_path / "out", code=2)
    assert "is a reward model" in err
    sft = {"fine_tuning": "LoRA", "lora_path": tmp_path / "out"}
    _, err = run("train", bench.config(tmp_path / "sft", **sft), code=2)
    assert "that adapter has the score of a reward model; only stage RM goes on with it" in err
    run("export", bench.config(tmp_path / "copy", **{**changes, "output_dir": tmp_path / "out"}), "--adapter")
    copies = [AdapterFolder.open(tmp_path / "out" / name) for name in (".", "adapter-export")]
    assert copies[0].config == copies[1].config
    if layout == "pt":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())["task_type"] == "SEQ_CLS"


def drawn_score(bench):
    base = Folder.open(bench.model)
    arch = base.config.replace(is_reward=True, num_nextn_predict_layers=0)
    return build_model(base, arch, seed=7).score.weight.numpy()


def test_a_reward_model_cannot_start_from_an_adapter_without_a_score(bench, keys, tmp_path, run):
    run("train", bench.config(tmp_path / "sft", fine_tuning="LoRA", max_steps=1))
    changes = {**keys, "fine_tuning": "LoRA", "lora_path": tmp_path / "sft"}
    _, err = run("train", bench.config(tmp_path / "out", **changes), code=2)
    assert "that adapter has no score, so a reward model cannot start from it" in err


def test_an_adapter_is_measured_on_pairs_beside_its_base(bench, keys, tmp_path, run):
    changes = {**keys, "stage": "DPO", "fine_tuning": "LoRA", "learning_rate": "1e-2"}
    run("train", bench.config(tmp_path / "out", **changes))
    measured = {"stage": "DPO", "eval_dataset_path": keys["eval_dataset_path"], "fine_tuning": "LoRA"}
    run("eval", bench.config(tmp_path / "eval", **measured, lora_path=tmp_path / "out"))
    found = json.loads((tmp_path / "eval" / "eval" / "metrics.json").read_bytes())
    last = [row for row in history(tmp_path / "out") if "eval_accuracy" in row][-1]
    assert last["eval_loss"] < 0.69  # the base beside itself: ln 2
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=0.01)
    assert found["eval_margin"] == pytest.approx(last["eval_margin"], rel=0.05)
