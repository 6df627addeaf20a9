"""Every way of moving weights from the command line: the loss falls, and a run that was cut ends bit-equal."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from erniekit.checkpoint.hf_files import SafetensorsFile
from erniekit.checkpoint.load import load_model

CASES = {
    "wsd": {"lr_scheduler_type": "wsd", "decay_function": "1-sqrt", "steady_steps": 2, "min_lr": "1e-5"},
    "polynomial": {"lr_scheduler_type": "polynomial", "power": 2, "layerwise_lr_decay_bound": 0.5},
    "muon": {"optim": "muon", "weight_decay": 0.1, "lr_multipliers": "{'experts': 0.5}"},
    "bf16 moments": {"optim": "adamw_16bit_moment"},
    "average": {"zcc_save_ema_coef": 0.9, "zcc_ema_interval": 2},
    "freeze": {"freeze": "['embed_tokens', 'layers\\.0\\.']", "moe_gate_lr_ratio": 0.1, "weight_decay": 0.1},
    "dropout": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "dropout_warmup_steps": 3},
    "dropout recomputed": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2, "recompute": True},
}


def outcome(out: Path) -> dict[str, object]:
    """What must be equal: weights, optimizer state, losses."""
    files = [out / "model.safetensors", *(out / "checkpoint-4").rglob("*.safetensors")]
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    digests = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {**digests, "losses": [row["loss"] for row in rows], "lr": [row["lr"] for row in rows]}


@pytest.fixture(scope="module")
def made(bench, tmp_path_factory):
    """made(case) -> (config file, the output folder of its uninterrupted run), each trained once."""
    from erniekit.cli.main import main

    folder, known = tmp_path_factory.mktemp("optimizers"), {}

    def train(case: str) -> tuple[Path, Path]:
        if case not in known:
            out = folder / case.replace(" ", "-")
            config = bench.config(out, max_steps=4, eval_dataset_path=None, **CASES[case])
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


def tensors(path: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def test_what_is_frozen_is_saved_as_it_was_and_has_no_state(made, bench):
    _, out = made("freeze")
    before, after = tensors(bench.model / "model.safetensors"), tensors(out / "model.safetensors")
    same = {name for name in before if np.array_equal(before[name].view(np.uint8), after[name].view(np.uint8))}
    frozen = {name for name in before if "embed_tokens" in name or ".layers.0." in name}
    assert frozen <= same and len(same) < len(before)
    state = SafetensorsFile(out / "checkpoint-4/training/optimizer.safetensors").tensors
    assert not [name for name in state if "embed_tokens" in name or ".layers.0." in name]


def test_moments_are_kept_in_bf16(made):
    state = SafetensorsFile(made("bf16 moments")[1] / "checkpoint-4/training/optimizer.safetensors").tensors
    assert {stored.tag for stored in state.values()} == {"BF16"}


def test_the_average_is_saved_beside_the_model(made):
    _, out = made("average")
    state = tensors(out / "checkpoint-4/training/optimizer.safetensors")
    averaged = dict(load_model(out / "ema").named_parameters())
    own = dict(load_model(out).named_parameters())
    apart = 0
    for name, p in averaged.items():
        expected = state.get(f"{name}.ema", own[name].numpy())  # what is not trained has no average
        np.testing.assert_allclose(p.numpy(), expected, rtol=2**-8)  # rounded to the base model's bf16
        apart += not np.array_equal(p.numpy(), own[name].numpy())
    assert apart > len(averaged) / 2


def test_recomputation_and_dropout_go_together(made, bench, run, tmp_path):
    """The same losses with and without recomputing."""
    _, out = made("dropout recomputed")
    keys = {**CASES["dropout recomputed"], "recompute": False}
    run("train", bench.config(tmp_path / "out", max_steps=4, eval_dataset_path=None, **keys))
    assert outcome(tmp_path / "out")["losses"] == outcome(out)["losses"]


def test_bad_patterns_and_factors_are_told_at_once(bench, run, tmp_path):
    config = bench.config(tmp_path / "out", freeze="['(']", lr_multipliers="{'gate': 0}", train_emb_only=1)
    _, err = run("train", config, "train_moe_only=1", code=2)
    for part in ("'(' is no regular expression", "'gate': 0 is no number above 0", "only one of them can be"):
        assert part in err
    config = bench.config(tmp_path / "out", freeze="embed_token.weight", lr_multipliers="{'gatte': 2}")
    _, err = run("train", config, code=2)
    assert "'embed_token.weight' matches no parameter" in err and "model.embed_tokens.weight" in err
    assert "lr_multipliers: 'gatte' matches no parameter" in err
    assert not (tmp_path / "out").exists()  # the corrected file will find no trace of this one


def test_replay_drops_what_the_step_dropped(bench, run, tmp_path):
    """With so small a factor, the first step after the ten that are compared with counts as a spike."""
    out = tmp_path / "out"
    keys = {**CASES["dropout recomputed"], "spike_factor": 0.1, "save_strategy": "no"}
    run("train", bench.config(out, max_steps=11, eval_dataset_path=None, **keys))
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    said, _ = run("replay", out / "replay" / "step-11")
    assert f"its loss: {rows[10]['loss']:.6g};" in said
