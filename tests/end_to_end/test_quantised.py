"""Quantised weights from the command line: what is refused, and evaluation and chat that quantise while they load."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

LORA = {"fine_tuning": "LoRA", "compute_type": "wint4/8", "max_steps": 1}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"compute_type": "wint8", "fine_tuning": "Full"}, ("fine_tuning: Full", "compute_type: wint8", "LoRA")),
        ({"group_size": 48}, ("every 48 inputs", "model.layers.0.self_attn.q_proj has 64", "Set group_size")),
        ({"group_size": 0}, ("group_size: 0", "-1")),
        ({"modules_to_save": "[q_proj]", "lora_target_modules": "experts"}, ("q_proj", "few bits", "wint4/8")),
    ],
    ids=["full", "group", "no group", "whole module"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bench, run, tmp_path, keys, said):
    out = tmp_path / "run"
    _, err = run("train", bench.config(out, **(LORA | keys)), code=2)
    for words in said:
        assert words in err
    assert not out.exists()


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_quantised_folder_is_no_base(bench, run, tmp_path, fine_tuning):
    base = tmp_path / "W4A8"
    shutil.copytree(bench.model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "w4a8"}}))
    keys = {"fine_tuning": fine_tuning, "model_name_or_path": base, "max_steps": 1}
    _, err = run("train", bench.config(tmp_path / "run", **keys), code=2)
    assert f"{base}: is a quantised model" in err and "compute_type: wint8" in err


def test_eval_quantises_while_it_loads(bench, run, tmp_path):
    losses = {}
    for compute_type in ("fp32", "wint8", "wint4", "nf4"):
        out = tmp_path / compute_type
        keys = {"train_dataset_path": None, "compute_type": compute_type, "fine_tuning": None, "group_size": 32}
        run("eval", bench.config(out, **keys))
        losses[compute_type] = json.loads(Path(out / "eval" / "metrics.json").read_text())["eval_loss"]
    assert len(set(losses.values())) == 4
    for compute_type, most in (("wint8", 2e-3), ("wint4", 0.1), ("nf4", 0.1)):
        assert abs(losses[compute_type] - losses["fp32"]) < most


def test_chat_quantises_while_it_loads(bench, run, tmp_path, monkeypatch):
    from erniekit.recipes import chat

    asked = []
    real = chat.load_for_answers
    monkeypatch.setattr(chat, "load_for_answers", lambda *a, **k: asked.append(k["pack"]) or real(*a, **k))
    monkeypatch.setattr("sys.stdin", io.StringIO("say red and blue\n"))
    keys = {"train_dataset_path": None, "fine_tuning": None, "compute_type": "wint4/8", "max_new_tokens": 4}
    run("chat", bench.config(tmp_path / "chat", **keys))
    assert [pack.compute_type for pack in asked] == ["wint4/8"]
