"""Training adapters from the command line: the loss falls, the base is left alone, and a run that was cut ends
bit-equal, however the adapters start and whatever is drawn in them."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from erniekit.checkpoint.hf_files import SafetensorsFile
from tests.end_to_end.test_observe import spoil

CASES = {
    "lora": {"lora_rank": 4},
    "pissa": {"lora_init": "pissa", "rslora": True, "lora_rank": 4},
    "dora": {"dora": True, "lora_target_modules": "[attention, mlp]", "lora_dropout": 0.1},
    "dropout recomputed": {"lora_dropout": 0.3, "recompute": True, "rslora_plus": True},
    "whole modules": {
        "modules_to_save": "[embed_tokens, mlp.gate]", "lora_target_modules": "experts", "ema_decay": 0.9,
        "moe_use_aux_free": True,
    },
    "quantised": {"compute_type": "wint4/8", "lora_target_modules": "[attention, experts]"},
    "quantised, dora": {"compute_type": "nf4", "group_size": 16, "dora": True, "lora_target_modules": "attention"},
    "text": {"stage": "PT", "lora_target_modules": "[q_proj, v_proj]", "lora_plus_scale": 4},
}  # fmt: skip


def outcome(out: Path) -> dict[str, object]:
    """What must be equal: adapters, optimizer state, losses."""
    files = [*out.glob("*.safetensors"), *(out / "checkpoint-4").rglob("*.safetensors"), *out.glob("ema/*.safetensors")]
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    digests = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(digests) >= 3
    return {**digests, "losses": [row["loss"] for row in rows], "lr": [row["lr"] for row in rows]}


@pytest.fixture(scope="module")
def made(bench, tmp_path_factory):
    """made(case) -> (config file, the output folder of its uninterrupted run), each trained once."""
    from erniekit.cli.main import main

    folder, known = tmp_path_factory.mktemp("adapters"), {}

    def train(case: str) -> tuple[Path, Path]:
        if case not in known:
            out, keys = folder / case.replace(" ", "-"), dict(CASES[case])
            if keys.get("stage") == "PT":
                keys |= {"train_dataset_path": bench.folder / "text.jsonl", "train_dataset_type": None}
            keys = {"max_steps": 4, "eval_dataset_path": None, "learning_rate": "1e-2", **keys}
            config = bench.config(out, **(keys | {"fine_tuning": "LoRA"}))
            assert main(["train", str(config)]) == 0
            known[case] = config, out
        return known[case]

    return train


@pytest.mark.parametrize("case", CASES)
def test_a_run_cut_in_half_ends_bit_equal(case, made, run):
    config, out = made(case)
    whole = outcome(out)
    assert whole["losses"][-1] < whole["losses"][0]
    shutil.rmtree(out / "checkpoint-4")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished_at": None}))
    _, err = run("train", config)
    assert "checkpoint-2 (step 2 of 4)" in err
    assert outcome(out) == whole


def test_only_adapters_are_saved_and_have_states(made):
    _, out = made("whole modules")
    states = SafetensorsFile(out / "checkpoint-4/training/optimizer.safetensors").tensors
    trained = {"model.embed_tokens.weight", *(f"model.layers.{i}.mlp.gate.weight" for i in (1, 2))}
    for i, part, factor in itertools.product((1, 2), ("gate_up", "down"), "AB"):
        trained.add(f"model.layers.{i}.mlp.experts.{part}_adapter.lora_{factor}")
    assert {name.rpartition(".")[0] for name in states} == trained
    names = [name for path in (out / "checkpoint-4").glob("*.safetensors") for name in SafetensorsFile(path).tensors]
    assert names and not [name for name in names if "self_attn" in name or "moe_statics" in name]


def test_a_run_goes_on_from_an_adapter(made, bench, run, tmp_path):
    _, first = made("lora")
    losses = [json.loads(line)["loss"] for line in (first / "train_log.jsonl").read_text().splitlines()]
    keys = {"fine_tuning": "LoRA", "max_steps": 1, "eval_dataset_path": None}
    config = bench.config(tmp_path / "second", lora_path=first / "checkpoint-4", **keys)
    _, err = run("train", config)
    assert "adapters of rank 4" in err
    second = json.loads((tmp_path / "second" / "train_log.jsonl").read_text().splitlines()[0])["loss"]
    assert second < losses[1]
    _, err = run("train", config, "lora_rank=8", f"output_dir={tmp_path / 'third'}", code=2)
    assert "lora_rank: 8 contradicts the adapter in lora_path, which has 4" in err


def test_a_checkpoint_of_other_weights_is_refused(bench, run, tmp_path):
    base = tmp_path / "model"
    shutil.copytree(bench.model, base)
    keys = {"fine_tuning": "LoRA", "model_name_or_path": base, "eval_dataset_path": None}
    config = bench.config(tmp_path / "run", max_steps=1, **keys)
    run("train", config)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    _, err = run("train", config, "max_steps=2", code=2)
    assert "trained beside other weights" in err


def test_a_step_that_went_wrong_is_replayed_beside_its_base(bench, run, tmp_path):
    base = spoil(bench, tmp_path / "model", "layers.1.self_attn.o_proj.weight", float("nan"))
    keys = {"fine_tuning": "LoRA", "model_name_or_path": base, "eval_dataset_path": None}
    run("train", bench.config(tmp_path / "out", **keys), code=2)
    shown, _ = run("replay", tmp_path / "out" / "replay" / "step-1")
    assert "The first value that is not finite arises in model.layers.1.self_attn.o_proj" in shown
