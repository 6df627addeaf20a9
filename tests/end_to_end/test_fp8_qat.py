"""The official FP8 file on a micro model: trained by emulation, cut and resumed, exported with its scales; and DPO."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_for_answers
from erniekit.config.load import load_config
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import architecture, assemble_fp8, assemble_model
from erniekit.training.state import load_memory

OFFICIAL = Path(__file__).parents[2] / "examples/configs/ERNIE-4.5-300B-A47B/sft/run_sft_fp8_8k.yaml"
KEYS = {
    "fp8_emulate": True, "max_steps": 4, "save_steps": 2, "max_seq_len": 64, "gradient_accumulation_steps": 2,
    "eval_steps": 4, "learning_rate": "1e-3", "lr_scheduler_type": "constant", "warmup_steps": 0, "report_samples": 0,
    "apply_online_actscale_step": 2, "tensor_parallel_degree": 1, "pipeline_parallel_degree": 1,
    "sequence_parallel": False, "dataloader_num_workers": 0,
}  # fmt: skip


def words(bench, out: Path, **keys: object) -> list[str]:
    named = {
        "model_name_or_path": bench.model, "train_dataset_path": bench.folder / "train.jsonl",
        "eval_dataset_path": bench.folder / "eval.jsonl", "output_dir": out, "logging_dir": out / "runs",
    }  # fmt: skip
    return [str(OFFICIAL), *(f"{key}={value}" for key, value in {**KEYS, **named, **keys}.items())]


def digests(out: Path, step: int = 4) -> dict[str, str]:
    files = [*out.glob("*.safetensors"), *(out / f"checkpoint-{step}").rglob("*.safetensors")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory):
    from erniekit.cli.main import main

    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(["train", *words(bench, out)]) == 0
    return out


def test_cut_and_resumed_it_ends_bit_equal(finished, bench, run, tmp_path):
    """The scales of inputs come from the checkpoint: without them the kept ones of step 3 would be others."""
    out = tmp_path / "out"
    run("train", *words(bench, out, max_steps=2))
    run("train", *words(bench, out))
    assert digests(out) == digests(finished)
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_exports(finished, bench, run):
    """The FP8 folder gives what the trained model gives in evaluation; the plain one has the weights of its codes."""
    run("export", *words(bench, finished), "--quantize", "fp8")
    run("export", *words(bench, finished))
    run("verify", finished / "export")
    run("verify", finished / "export-fp8")
    checkpoint = finished / "checkpoint-4"
    cfg = load_config(finished / "run.yaml")
    folder = Folder.open(checkpoint)
    model = assemble_model(folder, architecture(folder, cfg), cfg)
    fp8 = assemble_fp8(model, cfg)
    load_memory(checkpoint, fp8.memory, model, Mesh.single())
    model.eval()
    ids = paddle.to_tensor(np.random.default_rng(0).integers(3, 400, (2, 48)), "int64")
    with paddle.no_grad():
        trained = model(ids)
        exported, plain, masters = (load_for_answers(path)(ids) for path in (
            finished / "export-fp8", finished / "export", checkpoint
        ))  # fmt: skip
    assert float((trained - exported).abs().max()) < 1e-5
    assert 1e-3 < float((trained - plain).abs().max()) < 0.2, "inputs are not rounded there"
    assert float((masters - plain).abs().max()) > 1e-3
    data = [f"eval_dataset_path={bench.folder / 'eval.jsonl'}", "max_seq_len=64", "stage=SFT"]
    measured, _ = run("eval", finished / "export-fp8", *data, "--reference", "none")
    rows = [json.loads(line) for line in (finished / "train_log.jsonl").read_text().splitlines()]
    (loss,) = (row["eval_loss"] for row in rows if "eval_loss" in row)
    found = float(measured.split("eval_loss")[1].split()[0])
    assert found == pytest.approx(loss, abs=2e-6), "the last step of training measured the same codes"
    config = json.loads((finished / "export-fp8" / "config.json").read_text())["quantization_config"]
    assert config["dense_quant_type"] == config["moe_quant_type"] == "tensor_wise_fp8" and config["apply_hadamard"]


def test_scales_can_be_forgotten(finished, bench, run, tmp_path):
    out = tmp_path / "out"
    keys = {"save_steps": 1, "eval_steps": 100}
    run("train", *words(bench, out, **keys, max_steps=1))
    run("train", *words(bench, out, **keys, max_steps=2, fp8_force_clear_state=True))
    kept = load_file(out / "checkpoint-2" / "training" / "memory.safetensors")
    steps = [found for name, found in kept.items() if name.startswith("activation_steps")]
    assert steps and all((found <= 1).all() for found in steps)


def test_preferences(bench, run, tmp_path):
    """The reference computes in FP8, too: the first loss is ln 2. A resumed run has the same one."""
    pairs = tmp_path / "pairs.jsonl"
    row = {"src": ["say red and blue"], "tgt": [], "response": [["red blue"], ["green tree"]], "sort": [1, 0]}
    pairs.write_text(json.dumps(row) + "\n" + json.dumps({**row, "src": ["say one and two"]}) + "\n")
    keys = {"stage": "DPO", "train_dataset_path": pairs, "eval_dataset_path": pairs, "max_prompt_len": 32,
            "cache_data": False, "save_steps": 1}  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", *words(bench, whole, **keys, max_steps=2))
    rows = [json.loads(line) for line in (whole / "train_log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    run("train", *words(bench, cut, **keys, max_steps=1))
    run("train", *words(bench, cut, **keys, max_steps=2))
    assert digests(cut, 2) == digests(whole, 2)
