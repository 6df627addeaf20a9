"""The data files under examples/data train: one step of a micro model on each that this version can learn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sft", {"train_dataset_type": "erniekit"}),
        ("pt", {"train_dataset_type": "erniekit", "stage": "PT"}),
        ("function-call", {"train_dataset_type": "chatml", "chat_template": "ernie_thinking"}),
        ("sft_think", {"train_dataset_type": "messages", "chat_template": "ernie_thinking"}),
    ],
)
def test_one_step(name, keys, bench, run, tmp_path):
    held_out = DATA / f"{name}-eval.jsonl"
    if held_out.exists():
        keys |= {"eval_dataset_path": held_out, "eval_dataset_type": keys["train_dataset_type"]}
    else:
        keys |= {"eval_dataset_path": None}
    run("train", bench.config(
        tmp_path / "out", train_dataset_path=DATA / f"{name}-train.jsonl", max_seq_len=1024, max_steps=1,
        evaluation_strategy="steps", eval_steps=1, **keys,
    ))  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "keys", "start"),
    [
        ("dpo", {"train_dataset_type": "erniekit", "eval_dataset_path": DATA / "dpo-eval.jsonl"}, math.log(2)),
        ("dpo-alpaca", {"train_dataset_type": "alpaca", "eval_dataset_path": None}, math.log(2)),
        ("dpo-messages", {"train_dataset_type": "messages", "eval_dataset_path": None}, math.log(2)),
        ("kto", {"stage": "KTO", "eval_dataset_path": DATA / "kto-eval.jsonl"}, 0.5),
    ],
)
def test_one_step_of_preferences(name, keys, start, bench, run, tmp_path):
    """Where training starts, the model is its own reference."""
    run("train", bench.config(tmp_path / "out", **{
        "stage": "DPO", "train_dataset_type": None, "train_dataset_path": DATA / f"{name}-train.jsonl",
        "max_seq_len": 1024, "max_steps": 1, **keys,
    }))  # fmt: skip
    row = json.loads((tmp_path / "out" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["loss"] == pytest.approx(start, rel=1e-6)
