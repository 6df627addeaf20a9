"""A quantised folder from the command line: made, measured beside its origin, asked, refused where it has no place."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import paddle
import pytest

import erniekit
from erniekit.base import resources
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import build_model
from erniekit.checkpoint.quantised_figures import layer_errors
from erniekit.checkpoint.quantised_folder import QuantisedFolder
from erniekit.checkpoint.save import REPORT_FILE
from erniekit.data.tokenizer import Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.rollout.generate import generate


@pytest.fixture(scope="module")
def folders(bench, tmp_path_factory):
    """Folders of the micro model, by format."""
    from erniekit.cli.main import main

    root = tmp_path_factory.mktemp("quantised")
    for name in ("wint4", "w4a8c8"):
        words = ["--quantize", name, "--out", root / name, "--calibration", bench.folder / "text.jsonl"]
        assert main([str(word) for word in ("export", bench.model, *words, "--calibration-tokens", 512)]) == 0
    return root


def log_probs(model: ErnieForCausalLM, rows: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Of the whole vocabulary, wherever a token is trained: the long way."""
    found = []
    for ids, labels in rows:
        logits = model(paddle.to_tensor(ids[None])).numpy()[0][labels >= 0].astype(np.float64)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return found


def eval_rows(bench) -> list[tuple[np.ndarray, np.ndarray]]:
    from erniekit.config.load import load_config
    from erniekit.data.build import build_eval_data

    keys = {"eval_dataset_path": str(bench.folder / "eval.jsonl"), "max_seq_len": 64}
    data = build_eval_data(load_config(keys).data, Tokenizer.from_folder(bench.model), stage="SFT", seed=0)
    documents = [d for i in range(data.store.num_samples) for d in data.store.row([i]).documents]
    return [(d.input_ids, d.labels) for d in documents]


def test_eval_measures_a_folder_beside_its_origin(bench, run, tmp_path, folders):
    data = f"eval_dataset_path={bench.folder / 'eval.jsonl'}"
    out, err = run("eval", folders / "wint4", data, "max_seq_len=64", f"output_dir={tmp_path}", "stage=SFT")
    assert f"compared with {bench.model}" in out + err
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    rows = eval_rows(bench)
    exact, mine = (log_probs(erniekit.load_model(path), rows) for path in (bench.model, folders / "wint4"))
    tokens = sum(map(len, exact))
    assert found["eval_tokens"] == tokens
    divergence = sum((np.exp(p) * (p - q)).sum() for p, q in zip(exact, mine, strict=True)) / tokens
    same = sum((p.argmax(-1) == q.argmax(-1)).sum() for p, q in zip(exact, mine, strict=True)) / tokens
    assert found["eval_kl"] == pytest.approx(divergence, rel=1e-3) and divergence > 1e-6
    assert found["eval_same_best_token"] == pytest.approx(same)
    loss = -sum(q[np.arange(len(q)), labels[labels >= 0]].sum() for q, (_, labels) in zip(mine, rows, strict=True))
    assert found["eval_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    folder = QuantisedFolder.open(folders / "wint4")
    assert found["disk_bytes"] == (folders / "wint4" / "model.safetensors").stat().st_size
    assert 4.2 < found["bits_per_quantised_weight"] < 5.5 < found["bits_per_weight"] < 16
    weights = {name: p.numpy() for name, p in erniekit.load_model(bench.model).named_parameters()}
    decoded = {name: p.numpy() for name, p in build_model(folder, folder.config).named_parameters()}
    pairs = [(weights[name], decoded[name]) for name in weights if name.startswith("model.layers.1.")]
    pairs = [(weight, made) for weight, made in pairs if not np.array_equal(weight, made)]
    error = sum(((weight - made) ** 2).sum(dtype=np.float64) for weight, made in pairs)
    whole = sum((weight**2).sum(dtype=np.float64) for weight, _ in pairs)
    assert found["error/ernie.layers.1"] == pytest.approx(math.sqrt(error / whole), rel=1e-4)
    for name in found:
        assert name in out


def test_eval_without_a_reference_and_with_one_that_does_not_fit(bench, run, folders, tmp_path):
    data = [f"eval_dataset_path={bench.folder / 'eval.jsonl'}", "max_seq_len=64", "stage=SFT"]
    out, _ = run("eval", folders / "w4a8c8", *data, "--reference", "none", f"output_dir={tmp_path}")
    assert "eval_kl" not in out and "error/ernie.layers.0" in out
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    report = json.loads((folders / "w4a8c8" / REPORT_FILE).read_bytes())
    for name in ("bits_per_weight", "bits_per_quantised_weight"):
        assert found[name] == pytest.approx(report[name])
    assert found["error"] == pytest.approx(report["relative_error"]) and found["eval_perplexity"] > 1
    run("init", "--family", "micro-moe", "--out", tmp_path / "other", "--vocab-size", "700")
    _, err = run("eval", folders / "wint4", *data, "--reference", tmp_path / "other", code=2)
    assert f"{tmp_path / 'other'}: is no reference for" in err and "700 tokens" in err
    out, err = run("eval", folders / "wint4", *data, "compute_type=wint4", code=2)
    assert "is quantised (wint4) for inference already" in err and "evaluation data" not in out  # nothing was read
    out, _ = run("eval", bench.model, *data, "compute_type=wint8", "--reference", bench.model)
    assert "eval_kl" in out and "bits_per_weight" not in out


def test_an_origin_without_memory_or_gone_is_not_compared_with(bench, run, folders, tmp_path, monkeypatch):
    """And it is said how much it takes: that of the micro model in fp32."""
    data = [f"eval_dataset_path={bench.folder / 'eval.jsonl'}", "max_seq_len=64", "stage=SFT"]
    numbers = sum(int(p.size) for p in erniekit.load_model(bench.model).parameters())
    monkeypatch.setattr(resources, "memory", lambda: (10**9, 4 * numbers - 1))
    out, err = run("eval", folders / "wint4", *data)
    assert f"not compared with {bench.model}" in out + err and f"in memory {4e-6 * numbers:,.1f} MB" in out + err
    assert "eval_kl" not in out and "error/ernie.layers.0" in out
    monkeypatch.setattr(resources, "memory", lambda: (10**9, 4 * numbers))
    assert "eval_kl" in run("eval", folders / "wint4", *data)[0]
    shutil.copytree(folders / "wint4", tmp_path / "moved")
    report = json.loads((tmp_path / "moved" / REPORT_FILE).read_bytes()) | {"model": str(tmp_path / "gone")}
    (tmp_path / "moved" / REPORT_FILE).write_text(json.dumps(report))
    out, err = run("eval", tmp_path / "moved", *data)
    assert f"not compared with {tmp_path / 'gone'}" in out + err and "eval_kl" not in out


def test_errors_of_a_folder_without_a_report_are_measured(bench, folders, tmp_path):
    shutil.copytree(folders / "wint4", tmp_path / "bare")
    (tmp_path / "bare" / REPORT_FILE).unlink()
    bare, reported = (QuantisedFolder.open(path) for path in (tmp_path / "bare", folders / "wint4"))
    measured = layer_errors(bare, Folder.open(bench.model))
    assert layer_errors(bare, None) == {} and len(measured) == 4
    assert measured == pytest.approx(layer_errors(reported, None), rel=1e-4)


def test_chat_answers_as_the_decoded_model(bench, run, folders, monkeypatch):
    folder = QuantisedFolder.open(folders / "wint4")
    dense = build_model(folder, folder.config)
    dense.eval()
    tokenizer = Tokenizer.from_folder(bench.model)
    messages = [{"role": "user", "content": "say red and blue"}]
    want = generate(dense, tokenizer, messages, max_new_tokens=12)
    assert want == generate(erniekit.load_model(folder.path), tokenizer, messages, max_new_tokens=12) and want
    monkeypatch.setattr("sys.stdin", io.StringIO("say red and blue\n"))
    out, _ = run("chat", folder.path, "temperature=0", "max_new_tokens=12")
    assert " ".join(want.split()) == " ".join(out.split())
    monkeypatch.setattr("sys.stdin", io.StringIO("say red and blue\n"))
    out, _ = run("chat", folders / "w4a8c8", "temperature=0", "max_new_tokens=12")
    small = erniekit.load_model(folders / "w4a8c8")
    assert " ".join(generate(small, tokenizer, messages, max_new_tokens=12).split()) == " ".join(out.split())


@pytest.mark.parametrize("words", ["train", "convert", "split", "resize-vocab", "export --quantize"])
def test_where_it_has_no_place_it_is_refused(bench, run, folders, tmp_path, words):
    path = folders / "wint4"
    config = bench.config(tmp_path / "run", model_name_or_path=path, max_steps=1)
    arguments: dict[str, list[object]] = {
        "train": ["train", config],
        "convert": ["convert", path, tmp_path / "out", "--to", "pt"],
        "split": ["split", path, "--out", tmp_path / "out"],
        "resize-vocab": ["resize-vocab", path, "--add-tokens", "<x>", "--out", tmp_path / "out"],
        "export --quantize": ["export", path, "--quantize", "wint8", "--out", tmp_path / "out"],
    }
    _, err = run(*arguments[words], code=2)
    assert str(path) in err and "quantised" in err
    assert not (tmp_path / "out").exists()


def test_verify_understands_it(run, folders):
    out, _ = run("verify", folders / "wint4")
    assert "fine" in out
