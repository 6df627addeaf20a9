"""Training on preferences through the command line: pairs, judged answers, reward models; full and with adapters."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.conftest import dialogue, write_rows

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "up", "down", "left", "moon", "sun", "tree"]
EVALUATING = {"evaluation_strategy": "steps", "eval_steps": 2}
LORA = {"fine_tuning": "LoRA", "lora_rank": 4}


def pair(number: int) -> dict:
    """A prompt whose better answer repeats it."""
    a, b, c = (WORDS[number * factor % 13] for factor in (1, 3, 5))
    return {"question": f"say {a} and {b} and {c}", "chosen": f"{a} {b} {c}", "rejected": f"never {c}"}


@pytest.fixture(scope="module")
def pairs(bench, tmp_path_factory):
    """Files of pairs, and a function that writes configs over them."""
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "train.jsonl", [pair(n) for n in range(1, 90)])
    write_rows(folder / "eval.jsonl", [pair(n) for n in range(90, 96)])
    write_rows(folder / "more.jsonl", [pair(n) for n in range(96, 100)])

    def config(out: Path, **keys: object) -> Path:
        data = {
            "stage": "DPO", "compute_type": "fp32", "train_dataset_type": None, "max_steps": 4, "save_steps": 1,
            "train_dataset_path": folder / "train.jsonl", "eval_dataset_path": folder / "eval.jsonl",
            "check_leaks": False, "data_cache_dir": out.parent / "cache", "gradient_accumulation_steps": 2,
        }  # fmt: skip
        return bench.config(out, **{**data, **keys})

    config.folder = folder
    return config


def rows(out: Path) -> list[dict]:
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_s"}
        for line in (out / "train_log.jsonl").read_text().splitlines()
    ]


def values(out: Path, name: str) -> list[float]:
    return [row[name] for row in rows(out) if name in row]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cut(out: Path, *, after: int) -> None:
    """As if the run had been killed after a save, and its cache had been cleared."""
    for path in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
        path.unlink()
    for path in out.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > after:
            shutil.rmtree(path)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished_at": None}))
    shutil.rmtree(out.parent / "cache", ignore_errors=True)


@pytest.fixture(scope="module")
def adapter(pairs, tmp_path_factory):
    """An adapter that was fine-tuned on dialogues."""
    from erniekit.cli.main import main

    folder = tmp_path_factory.mktemp("adapter")
    data = write_rows(folder / "talks.jsonl", [dialogue(n) for n in range(60)])
    keys = {"stage": "SFT", "train_dataset_path": data, "eval_dataset_path": None, "learning_rate": "5e-2"}
    assert main(["train", str(pairs(folder / "out", **keys, **LORA))]) == 0
    return folder / "out"


# ---------------------------------------------------------------------- one run of each kind
@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"ref_model_update_steps": 2, "attention_probs_dropout_prob": 0.1, "dropout_warmup_steps": 2}, math.log(2)),
        ({"loss_type": "bco", "ema_decay": 0.9}, None),
        ({**LORA, "ref_model_update_steps": 2, "lora_dropout": 0.1}, None),
        ({"stage": "KTO"}, 0.5),
        ({"stage": "KTO", **LORA}, 0.5),
        ({"stage": "RM"}, None),
    ],
    ids=["dpo, dropout and a moving reference", "bco", "dpo lora", "kto", "kto lora", "rm"],
)
def test_a_run_that_was_cut_ends_bit_equal(pairs, run, tmp_path, keys, start):
    out = tmp_path / "out"
    config = pairs(out, **keys, **EVALUATING)
    shown, _ = run("train", config)
    losses = values(out, "loss")
    assert len(losses) == 4 and (start is None or losses[0] == pytest.approx(start, abs=1e-6))
    assert re.search(r"step 1/4 loss [\d.]+ accuracy [\d.]+ margin [+-][\d.]+ lr", shown)
    assert re.search(r"eval at step 2: loss [\d.]+ accuracy [\d.]+ margin [+-][\d.]+\n", shown)
    assert {"rewards_chosen", "rewards_rejected", "margin", "accuracy"} <= rows(out)[0].keys()
    whole, log = digests(out), rows(out)
    cut(out, after=3)  # when a reference that moves is a copy already
    _, err = run("train", config)
    assert "resuming from" in err and rows(out) == log
    assert digests(out) == whole


def test_the_loss_falls_and_held_out_pairs_are_told_apart(pairs, run, tmp_path):
    out = tmp_path / "out"
    both = f"{pairs.folder / 'eval.jsonl'},{pairs.folder / 'more.jsonl'}"
    keys = {"max_steps": 12, "save_strategy": "no", "eval_dataset_path": both, "learning_rate": "3e-3"}
    shown, _ = run("train", pairs(out, **keys, **EVALUATING, report_samples=2))
    losses, measured = values(out, "loss"), [row for row in rows(out) if "eval_loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6
    assert measured[-1]["eval_accuracy"] > 0.9 > 0.7 > measured[0]["eval_loss"] > measured[-1]["eval_loss"]
    assert measured[-1]["eval_margin"] == pytest.approx(
        measured[-1]["eval_rewards_chosen"] - measured[-1]["eval_rewards_rejected"], abs=1e-9
    )
    by_source = [measured[-1][f"eval_loss/{name}"] for name in ("eval", "more")]
    assert measured[-1]["eval_loss"] == pytest.approx((6 * by_source[0] + 4 * by_source[1]) / 10)
    assert re.search(r"\n  more: loss [\d.]+ accuracy [\d.]+\n", shown)
    assert all(kl >= 0 for kl in values(out, "kl")) and values(out, "logps_chosen")[0] < 0
    page = (out / "report.html").read_text()
    for part in ("Training on pairs (DPO)", "Rewards", "Margin of the rewards", "Accuracy: the better answer is ahead",
                 "KL to the reference", "eval accuracy", "last accuracy", "What the model was shown",
                 "Answers before and after"):  # fmt: skip
        assert part in page
    assert page.count("<article class=answer>") == 2


# ---------------------------------------------------------------------- the reference
def test_the_reference_of_a_run_that_begins_with_an_adapter_is_that_adapter(pairs, run, tmp_path, adapter):
    out, bare = tmp_path / "out", tmp_path / "bare"
    run("train", pairs(out, fine_tuning="LoRA", lora_path=adapter))
    run("train", pairs(bare, **LORA, max_steps=1))
    assert values(out, "loss")[0] == pytest.approx(math.log(2), abs=1e-6) and abs(values(out, "margin")[0]) < 1e-6
    assert values(out, "logps_chosen")[0] != pytest.approx(values(bare, "logps_chosen")[0], abs=1e-3)
    whole, log = digests(out), rows(out)
    cut(out, after=2)
    run("train", pairs(out, fine_tuning="LoRA", lora_path=adapter))
    assert digests(out) == whole and rows(out) == log


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_the_reference_becomes_the_policy_after_every_so_many_steps(pairs, run, tmp_path, keys):
    out = tmp_path / "out"
    run("train", pairs(out, **keys, ref_model_update_steps=2, max_steps=5, save_strategy="no"))
    at_the_reference = [abs(margin) < 1e-6 for margin in values(out, "margin")]
    assert at_the_reference == [True, False, True, False, True]


def test_a_second_run_finds_the_reference_and_a_changed_model_does_not(pairs, run, tmp_path, bench):
    first, _ = run("train", pairs(tmp_path / "one", max_steps=2))
    assert re.search(r"the reference: \d+ samples in", first)
    again, _ = run("train", pairs(tmp_path / "two", max_steps=2, learning_rate="1e-4"))
    assert "the reference:" not in again
    other = tmp_path / "model"
    shutil.copytree(bench.model, other)
    with (other / "config.json").open("a") as file:
        file.write("\n")
    changed, _ = run("train", pairs(tmp_path / "three", max_steps=2, model_name_or_path=other))
    assert "the reference:" in changed
    assert len(list((tmp_path / "cache").glob("reference-*.npz"))) == 2


def test_a_loss_without_a_reference_computes_none(pairs, run, tmp_path):
    shown, _ = run("train", pairs(tmp_path / "out", loss_type="simpo", max_steps=1))
    assert "the reference:" not in shown and not (tmp_path / "cache").exists()
    assert "kl" not in rows(tmp_path / "out")[0]


# ---------------------------------------------------------------------- what every run has
def test_a_step_does_not_depend_on_how_the_batch_is_cut(pairs, run, tmp_path):
    keys = {"max_steps": 2, "save_strategy": "no", "packing": False}
    run("train", pairs(tmp_path / "a", **keys, batch_size=4, gradient_accumulation_steps=1))
    run("train", pairs(tmp_path / "b", **keys, batch_size=1, gradient_accumulation_steps=4))
    assert values(tmp_path / "a", "loss") == pytest.approx(values(tmp_path / "b", "loss"), rel=1e-6)
    assert values(tmp_path / "a", "grad_norm") == pytest.approx(values(tmp_path / "b", "grad_norm"), rel=1e-4)


def test_the_best_model_by_a_figure_of_preferences(pairs, run, tmp_path):
    out = tmp_path / "out"
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "early_stopping_patience": 1,
            "max_steps": 8, "learning_rate": "0"}  # fmt: skip
    _, err = run("train", pairs(out, **keys, **EVALUATING))
    assert "stopped early after step 4" in err
    _, err = run("train", pairs(tmp_path / "no", metric_for_best_model="perplexity", **EVALUATING), code=2)
    assert "metric_for_best_model" in err and "eval_accuracy" in err


def test_the_canary_of_a_preference_run_is_made_of_dialogues(pairs, run, tmp_path, bench):
    out = tmp_path / "out"
    shown, err = run("train", pairs(
        out, max_steps=2, canary_dataset_path=bench.folder / "eval.jsonl", canary_max_increase=1e-9,
        learning_rate="3e-2",
    ), code=2)  # fmt: skip
    assert "canary at step 0: loss" in shown and "forgetting: the loss on canary_dataset_path rose" in err
    assert len(values(out, "canary_loss")) == 2 and (out / "model.safetensors").is_file()


@pytest.mark.parametrize("keys", [{}, {"stage": "KTO", **LORA}], ids=["dpo", "kto lora"])
def test_a_kept_step_is_replayed_with_its_reference(pairs, run, tmp_path, keys, monkeypatch):
    monkeypatch.setattr("erniekit.training.replay.StepKeeper.spike", lambda *_: "because")
    out = tmp_path / "out"
    run("train", pairs(out, **keys, max_steps=2))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    shown, _ = run("replay", out / "replay" / "step-2")
    found = re.search(r"its loss: ([\d.]+)", shown)
    assert float(found[1]) == pytest.approx(values(out, "loss")[1], rel=1e-5)
    assert "The largest activations are in " in shown and "all weights are finite" in shown


def test_a_run_is_repeated_from_its_lock_with_the_adapter_it_began_with(pairs, run, tmp_path, adapter):
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(adapter, start)
    run("train", pairs(out, fine_tuning="LoRA", lora_path=start, max_steps=2))
    shown, _ = run("reproduce", out, "--out", tmp_path / "again")
    assert "the losses of all 2 steps are bit-equal" in shown
    lock = yaml.safe_load((out / "run.lock.yaml").read_text())
    (name,) = [name for name in lock["adapter"]["files"] if name.endswith(".safetensors")]
    (start / name).write_bytes(b"other")
    _, err = run("reproduce", out, "--out", tmp_path / "more", code=2)
    assert f"{name}: its content is another" in err


def test_a_reward_model_orders_answers_and_goes_on_from_itself(pairs, run, tmp_path):
    out, more = tmp_path / "out", tmp_path / "more"
    run("train", pairs(out, stage="RM", max_steps=10, learning_rate="5e-3", save_strategy="no", **EVALUATING))
    assert values(out, "eval_accuracy")[-1] > 0.9
    run("train", pairs(more, stage="RM", model_name_or_path=out, max_steps=1))
    assert values(more, "loss")[0] < values(out, "loss")[0] / 2


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta": 0}, ["beta", "above 0"]),
        ({"beta": -0.1}, ["beta", "above 0"]),
        ({"loss_type": "sigmoyd"}, ["sigmoyd", "Did you mean 'sigmoid'"]),
        ({"loss_type": "gspo"}, ["gspo", "loss_type"]),
        ({"reference_free": True}, ["reference_free", "sigmoid", "simpo"]),
        ({"stage": "KTO", "reference_free": True}, ["reference_free", "KTO"]),
        ({"loss_type": "exo"}, ["label_smoothing", "exo"]),
    ],
    ids=["beta 0", "beta below 0", "misspelt loss", "unknown loss", "no reference", "kto without", "exo"],
)
def test_keys_that_cannot_be(pairs, run, tmp_path, keys, words):
    _, err = run("train", pairs(tmp_path / "out", **keys), code=2)
    assert all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_are_named(pairs, run, tmp_path):
    data = [pair(n) for n in range(1, 20)]
    del data[3]["chosen"]
    _, err = run("train", pairs(tmp_path / "out", train_dataset_path=write_rows(tmp_path / "a.jsonl", data)), code=2)
    assert "a.jsonl:4" in err and "chosen" in err


def test_equal_answers_and_long_prompts_go_to_the_ledger(pairs, run, tmp_path):
    data = [pair(n) for n in range(1, 60)]
    data[2]["rejected"] = data[2]["chosen"]
    data[5]["question"] = " ".join(WORDS * 3)
    out = tmp_path / "out"
    run("train", pairs(out, train_dataset_path=write_rows(tmp_path / "a.jsonl", data), max_prompt_len=40, max_steps=1,
                       max_dropped_fraction=0.1))  # fmt: skip
    ledger = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    reasons = {entry["name"].rpartition(":")[2]: entry["reason"] for entry in ledger}
    assert "same" in reasons["3"] and "max_prompt_len 40" in reasons["6"]


@pytest.mark.parametrize(("key", "stage"), [("loss_type", "RM"), ("beta", "RM"), ("loss_type", "KTO")])
def test_keys_without_effect_are_named(pairs, run, tmp_path, key, stage):
    value = {"loss_type": "simpo", "beta": 0.3}[key]
    out, _ = run("check", pairs(tmp_path / "out", stage=stage, **{key: value}))
    assert re.search(rf"without effect here: .*{key}.*stage", out)
