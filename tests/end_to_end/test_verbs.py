"""From a trained run to answers, evaluation and exports, through the command line and the Python API."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import erniekit
from erniekit.checkpoint.folder import Folder
from erniekit.cli.main import main


@pytest.fixture(scope="module")
def trained(bench, tmp_path_factory):
    """A run long enough to have learnt its answers; returns its config."""
    config = bench.config(
        tmp_path_factory.mktemp("trained") / "out", max_steps=60, learning_rate="5e-3", save_strategy="no",
        batch_size=8, gradient_accumulation_steps=1, max_new_tokens=12,
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    return config


def figures(out: str) -> dict[str, float]:
    return {name: float(value.replace(",", "")) for name, value in re.findall(r"^(eval_\w+)\s+([\d.,]+)$", out, re.M)}


def test_eval_before_and_after(trained, run):
    before = figures(run("eval", trained)[0])
    out = trained.with_suffix("")
    shown, _ = run("eval", trained, f"model_name_or_path={out}", "eval_generate=3")
    after = figures(shown)
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_perplexity"] == pytest.approx(np.exp(after["eval_loss"]), rel=1e-3)
    assert 0 <= before["eval_accuracy"] < after["eval_accuracy"] <= 1
    assert shown.count("prompt:") == shown.count("reference:") == shown.count("answer:") == 3


def test_export_then_convert_back_gives_the_same_bytes(trained, run, tmp_path):
    out = trained.with_suffix("")
    run("export", trained)
    exported = out / "export"
    assert Folder.open(exported).layout == "pt"
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"} <= names
    assert "run.json" not in names
    run("verify", exported)
    run("convert", exported, tmp_path / "back", "--to", "paddle")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    _, err = run("export", trained, code=2)
    assert "not empty" in err
    ids = __import__("paddle").to_tensor([[5, 9, 42, 300]])
    assert np.array_equal(erniekit.load_model(exported)(ids).numpy(), erniekit.load_model(out)(ids).numpy())


def test_export_of_an_unfinished_run_names_the_way(bench, run, tmp_path):
    config = bench.config(tmp_path / "out", max_steps=2)
    assert "output_dir is not set" in run("export", config, "output_dir=null", code=2)[1]
    _, err = run("export", config, code=2)
    assert "does not exist" in err
    run("train", config)
    (tmp_path / "out" / "config.json").unlink()
    _, err = run("export", config, code=2)
    assert "--checkpoint 2" in err
    assert "holds no checkpoint-7; there are 2." in run("export", config, "--checkpoint", 7, code=2)[1]
    run("export", config, "--checkpoint", 2)
    run("verify", tmp_path / "out" / "export-2")
    assert not (tmp_path / "out" / "export-2" / "training").exists()


def test_weight_files_of_the_wanted_size(trained, run, tmp_path):
    out = trained.with_suffix("")
    run("split", trained, "--max-shard-size", "0.04MB")
    run("verify", out / "split_export")
    run("split", out, "--max-shard-size", "40KB", "--out", tmp_path / "split")
    made = (out / "split_export", tmp_path / "split")
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in made]
    assert names[0] == names[1] and len(names[0]) > 3
    ids = __import__("paddle").to_tensor([[5, 9, 42, 300]])
    assert np.array_equal(erniekit.load_model(tmp_path / "split")(ids).numpy(), erniekit.load_model(out)(ids).numpy())
    err = run("split", tmp_path / "split", "--out", out, code=2)[1]
    assert "not empty" in err


def test_max_shard_size_acts_in_training_and_export(bench, run, tmp_path, monkeypatch):
    monkeypatch.setattr("erniekit.training.weights.GB", 20_000)
    monkeypatch.setattr("erniekit.recipes.export.GB", 20_000)
    config = bench.config(tmp_path / "out", max_steps=1, save_strategy="no", max_shard_size=2)
    run("train", config)
    run("export", config)
    for folder in (tmp_path / "out", tmp_path / "out" / "export"):
        sizes = [path.stat().st_size for path in folder.glob("model-*.safetensors")]
        assert len(sizes) > 3
        run("verify", folder)


def test_a_repository_is_fetched_by_every_verb_that_reads_a_model(bench, run, tmp_path, monkeypatch):
    import io

    asked = []

    def fetched(name, hub):
        asked.append((name, hub))
        return bench.model

    for place in ("training.session", "recipes.evaluate", "recipes.chat", "checkpoint.download"):
        monkeypatch.setattr(f"erniekit.{place}.locate_model", fetched)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    name = "baidu/ERNIE-4.5-micro-PT"
    config = bench.config(tmp_path / "out", model_name_or_path=name, download_hub="aistudio", max_steps=1)
    run("eval", config)
    run("chat", config)
    run("chat", name, "download_hub=modelscope")
    run("train", config)
    assert asked == [(name, "aistudio")] * 2 + [(name, "modelscope"), (name, "aistudio")]


def test_chat_streams_what_generate_returns(trained, run, monkeypatch):
    import io

    question = "say red and blue"
    model = erniekit.load_model(trained.with_suffix(""))
    tokenizer = erniekit.load_tokenizer(trained.with_suffix(""))
    answer = erniekit.generate(model, tokenizer, [{"role": "user", "content": question}], max_new_tokens=12)
    assert answer
    for target in (trained, trained.with_suffix("")):
        monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
        out, _ = run("chat", target, "max_new_tokens=12", "temperature=0")
        assert out.splitlines()[-1] == answer


def test_api_train_returns_the_history(bench, tmp_path):
    config = bench.config(tmp_path / "out")
    result = erniekit.train(config, max_steps=3, learning_rate=1e-3)
    assert result.output_dir == str(tmp_path / "out")
    assert [row["step"] for row in result.history] == [1, 2, 3]
    assert result.metrics["loss"] == result.history[-1]["loss"]
    assert result.history == [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").open()]
    again = erniekit.train(config, max_steps=3, learning_rate=1e-3)
    assert again.history == result.history


def test_api_round_trip_through_both_layouts(trained, tmp_path):
    import paddle

    model = erniekit.load_model(trained.with_suffix(""))
    ids = paddle.to_tensor([[7, 8, 9]])
    expected = model(ids).numpy()
    assert expected.dtype == np.float32 and expected.shape == (1, 3, model.config.vocab_size)
    for layout in ("pt", "paddle"):
        erniekit.save_model(model, tmp_path / layout, layout=layout)
        assert Folder.open(tmp_path / layout).layout == layout
        assert np.array_equal(erniekit.load_model(tmp_path / layout)(ids).numpy(), expected)


def test_api_names_no_such_thing():
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        erniekit.nothing_of_this_name  # noqa: B018
