"""From a trained adapter to a model: exported, proved, evaluated and talked to, through the command line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_for_answers, load_model
from erniekit.checkpoint.manifest import check_manifest


@pytest.fixture(scope="module")
def trained(bench, tmp_path_factory) -> Path:
    """The config of a finished LoRA run over int8; its adapter lies in `run` beside it."""
    from erniekit.cli.main import main

    config = bench.config(
        tmp_path_factory.mktemp("lora") / "run", fine_tuning="LoRA", compute_type="wint8", lora_rank=4,
        learning_rate="2e-2", max_steps=4,
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    return config


@pytest.fixture
def adapter(trained) -> Path:
    return trained.with_suffix("")


def logits(model) -> np.ndarray:
    with paddle.no_grad():
        return model(paddle.arange(3, 43, dtype="int64").reshape([2, 20])).numpy()


@pytest.mark.parametrize("to", ["pt", "paddle"])
def test_export_merges_into_the_base_and_proves_it(trained, adapter, bench, run, tmp_path, to):
    out, _ = run("export", trained, "--to", to, "--out", tmp_path / "merged")
    assert "of the evaluation data" in out and "merged against base + adapter" in out
    merged = Folder.open(tmp_path / "merged")
    assert merged.layout == to and merged.config.dtype == "bfloat16" and check_manifest(merged.path) == []
    facts = json.loads((merged.path / "erniekit_merge.json").read_text())
    assert facts["adapters"] == [str(adapter)] and facts["base"] == str(bench.model)
    proof = facts["proof"]
    assert 0 < proof["merged"]["mean_kl"] < 0.05 * proof["adapter"]["mean_kl"] and proof["tolerance"] == 2e-3
    difference = logits(load_model(merged.path)) - logits(load_for_answers(bench.model, adapter=adapter))
    moved = logits(load_model(bench.model)) - logits(load_model(merged.path))
    assert np.abs(difference).max() < 0.2 * np.abs(moved).max()
    run("verify", merged.path)
    assert (merged.path / "tokenizer.model").is_file() and not (merged.path / "lora_config.json").exists()
    assert not (adapter / "export").exists()


def test_a_merge_that_is_too_far_leaves_nothing(trained, run, tmp_path):
    _, err = run("export", trained, "merge_tolerance=1e-12", "--out", tmp_path / "merged", code=2)
    assert "The merged model is not what base and adapter are" in err and "merge_tolerance" in err
    assert not (tmp_path / "merged").exists()
    _, err = run("export", trained, "merge_proof=false", "--out", tmp_path / "merged")
    assert "was not looked at" in err
    assert json.loads((tmp_path / "merged" / "erniekit_merge.json").read_text())["proof"] is None


def test_the_documented_way_of_erniekit(trained, adapter, bench, run, tmp_path):
    """run_export.yaml names base and output_dir; `lora=True` on the command line; also with lora_path alone."""
    shutil.copytree(adapter, tmp_path / "output", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = tmp_path / "run_export.yaml"
    config.write_text(f"model_name_or_path: {bench.model}\noutput_dir: {tmp_path / 'output'}\nmax_shard_size: 5\n")
    out, _ = run("export", config, "lora=True")
    assert "built-in texts" in out
    first = Folder.open(tmp_path / "output" / "export")
    run("export", config, "lora=True", f"lora_path={adapter}", f"output_dir={tmp_path / 'elsewhere'}")
    second = Folder.open(tmp_path / "elsewhere" / "export")
    assert all(np.array_equal(first.read_tensor(name), second.read_tensor(name)) for name in first.names)
    # A run that starts from lora_path, and left nothing yet.
    data = f"train_dataset_path={bench.folder / 'train.jsonl'}"
    words = ("lora=True", f"lora_path={adapter}", data, f"output_dir={tmp_path / 'begun'}")
    assert "there is nothing to export" in run("export", config, *words, code=2)[1]
    _, err = run("export", config, "lora=True", f"output_dir={tmp_path / 'empty'}", code=2)
    assert "does not exist: there is nothing to export" in err


def test_the_adapter_by_itself_in_both_forms(trained, adapter, bench, run, tmp_path):
    run("export", trained, "--adapter", "--out", tmp_path / "peft")
    run("export", trained, "--adapter", "--to", "paddle", "--out", tmp_path / "erniekit")
    run("export", trained, "--adapter", "--checkpoint", 2, "--out", tmp_path / "two")
    assert AdapterFolder.open(tmp_path / "peft").form == "peft"
    assert AdapterFolder.open(tmp_path / "erniekit").form == "erniekit"
    assert AdapterFolder.open(tmp_path / "two").dtype == "float32"
    expected = logits(load_for_answers(bench.model, adapter=adapter))
    for name in ("peft", "erniekit"):
        run("verify", tmp_path / name)
        found = logits(load_for_answers(bench.model, adapter=tmp_path / name))
        assert np.abs(found - expected).max() <= 2e-5, name


def test_several_adapters_become_one_model(trained, adapter, bench, run, tmp_path):
    run("export", trained, "--out", tmp_path / "ties", "--merge", f"{adapter}=0.7",
        f"{adapter / 'checkpoint-2'}=0.3", "--method", "ties", "--density", 0.5)  # fmt: skip
    facts = json.loads((tmp_path / "ties" / "erniekit_merge.json").read_text())
    assert (facts["weights"], facts["method"], facts["density"]) == ([0.7, 0.3], "ties", 0.5)
    run("verify", tmp_path / "ties")
    other = bench.config(tmp_path / "other", fine_tuning="LoRA", lora_target_modules="attention", max_steps=1)
    run("train", other)
    words = ("--merge", f"{adapter}=1", f"{tmp_path / 'other'}=1")
    _, err = run("export", trained, "--out", tmp_path / "no", *words, code=2)
    assert "Only adapters with the same targets are merged" in err and "gate_up_proj'" in err
    _, err = run("export", trained, "--method", "ties", code=2)
    assert "--method says how --merge does it" in err
    _, err = run("export", trained, "--merge", adapter, code=2)
    assert "is not a number" in err


def test_verbs_on_models_say_what_an_adapter_is(trained, adapter, bench, run, tmp_path):
    config = bench.config(tmp_path / "again", model_name_or_path=adapter)
    assert "Name its base as model_name_or_path and this folder as lora_path" in run("train", config, code=2)[1]
    assert "holds an adapter, not a model" in run("convert", adapter, tmp_path / "x", "--to", "pt", code=2)[1]
    assert "merge it first" in run("split", trained, code=2)[1]


def test_eval_and_chat_with_the_adapter(trained, adapter, bench, run, tmp_path):
    """The run's own config; a file of ERNIEKit's that names an adapter; the adapter folder itself."""
    out, err = run("eval", trained)
    assert f"measured with the adapter {adapter}" in err
    figures = json.loads((adapter / "eval" / "metrics.json").read_text())
    config = tmp_path / "run_eval.yaml"
    config.write_text(
        f"model_name_or_path: {bench.model}\nfine_tuning: LoRA\ncompute_type: bf16\nlora_rank: 32\nmax_seq_len: 64\n"
        f"eval_dataset_path: {bench.folder / 'eval.jsonl'}\neval_dataset_type: erniekit\nbatch_size: 2\n"
    )
    losses = {}
    for name, word in (("adapter", f"lora_path={adapter}"), ("wint8", f"lora_path={adapter}"), ("base", "lora_rank=8")):
        kind = "compute_type=wint8" if name == "wint8" else "compute_type=bf16"
        out, err = run("eval", config, word, kind)
        losses[name] = float(out.partition("eval_loss")[2].split()[0])
    assert losses["wint8"] == pytest.approx(figures["eval_loss"], abs=1e-6)  # as the run computes
    assert losses["adapter"] != losses["wint8"] and abs(losses["adapter"] - losses["wint8"]) < 0.05
    assert losses["base"] > losses["adapter"] + 0.1
    assert "the base is measured by itself" in err
    assert "lora_path acts with fine_tuning: LoRA only" in run("chat", bench.model, f"lora_path={adapter}", code=2)[1]


def test_chat_with_the_adapter(trained, adapter, bench, run, monkeypatch, tmp_path):
    said = {}
    for name, words in {
        "run": (trained,), "folder": (adapter, "compute_type=wint8"), "base": (bench.model, "compute_type=wint8"),
        "beside": (bench.model, "fine_tuning=LoRA", f"lora_path={adapter}", "compute_type=wint8"),
    }.items():  # fmt: skip
        monkeypatch.setattr("sys.stdin", io.StringIO("say sun and moon\n"))
        said[name], err = run("chat", *words, "temperature=0", "max_new_tokens=8")
        assert (f"with the adapter {adapter}" in err) == (name != "base")
    assert said["run"] == said["folder"] == said["beside"] != said["base"]
    lonely = tmp_path / "lonely"
    shutil.copytree(adapter, lonely, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((lonely / "lora_config.json").read_text())
    (lonely / "lora_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone"}))
    assert "names 'gone' as its model, which is not here" in run("chat", lonely, code=2)[1]
