"""Bad input through the command line: one clear message, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

from tests.end_to_end.conftest import write_rows

GOOD = {"src": ["a"], "tgt": ["b"]}


def broken_model(bench, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(bench.model, folder)
    (folder / "manifest.json").unlink()
    change(folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def poison(folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "owned"), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"ernie.norm.weight": Evil()}))


def drop_shard(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"ernie.norm.weight": "model-00001-of-00002.safetensors"}})
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: shutil.rmtree(f), ["model_name_or_path", "is not here", "download"]),
        (lambda f: (f / "config.json").unlink(), ["config.json", "missing"]),
        (lambda f: edit_config(f, model_type="llama"), ["llama", "ERNIE 4.5"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (truncate, ["model.safetensors", "truncated"]),
        (drop_shard, ["model-00001-of-00002.safetensors", "missing"]),
        (lambda f: edit_config(f, intermediate_size=96), ["mlp.down_proj.weight", "shape"]),
        (lambda f: edit_config(f, num_hidden_layers=4), ["layers.3", "missing"]),
        (poison, ["open"]),
        (lambda f: (f / "tokenizer.model").unlink(), ["tokenizer.model"]),
        (lambda f: (f / "tokenizer.model").write_bytes(b"no model"), ["tokenizer.model"]),
    ],
    ids=["absent", "no config", "another model", "config not json", "truncated", "shard missing", "shape",
         "layer missing", "pickle that runs code", "no tokenizer", "tokenizer damaged"],
)  # fmt: skip
def test_model_folder(bench, run, tmp_path, change, words):
    folder = broken_model(bench, tmp_path, change)
    _, err = run("train", bench.config(tmp_path / "out", model_name_or_path=folder), code=2)
    for word in words:
        assert word in err, err
    assert not (tmp_path / "owned").exists() and not (folder / "owned").exists()


def test_a_hub_id_that_is_not_here_prints_the_download_command(bench, run, tmp_path):
    config = bench.config(tmp_path / "out", model_name_or_path="baidu/ERNIE-4.5-0.3B-Paddle")
    _, err = run("train", config, code=2)
    assert "download baidu/ERNIE-4.5-0.3B-Paddle" in err


def test_tokenizer_of_a_larger_vocabulary(bench, run, tmp_path):
    from erniekit.checkpoint.create import create

    create("micro-moe", tmp_path / "small", layout="pt", vocab_size=300)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(bench.model / name, tmp_path / "small")
    _, err = run("train", bench.config(tmp_path / "out", model_name_or_path=tmp_path / "small"), code=2)
    assert "300" in err and "vocab_size" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["nothing to train on"]),
        (json.dumps(GOOD) + "\n{not json\n", ["rows.jsonl:2", "JSON"]),
        (json.dumps({"src": ["a", "b"], "tgt": ["c"]}) + "\n", ["rows.jsonl:1", "src", "tgt"]),
        (json.dumps({**GOOD, "label": [1, 0]}) + "\n", ["rows.jsonl:1", "label"]),
        (json.dumps({"source": ["a"]}) + "\n", ["rows.jsonl:1", "src"]),
    ],
    ids=["empty", "not json", "lengths", "label length", "no src"],
)
def test_data(bench, run, tmp_path, content, words):
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    _, err = run("train", bench.config(tmp_path / "out", train_dataset_path=data), code=2)
    for word in words:
        assert word in err, err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_all_bad_rows_are_counted_at_once(bench, run, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [GOOD, {"src": []}, GOOD, {"tgt": ["x"]}])
    _, err = run("train", bench.config(tmp_path / "out", train_dataset_path=data), code=2)
    assert "rows.jsonl:2" in err and "rows.jsonl:4" in err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "0", ":9"]),
        ({"stage": "SFTT"}, ["SFTT", "SFT"]),
        ({"stage": "PPO"}, ["PPO", "not built"]),
        ({"learning_rat": 1}, ["learning_rat", "learning_rate"]),
        ({"tensor_parallel_degree": 8}, ["tensor_parallel_degree", "8"]),
        ({"output_dir": "/proc/erniekit"}, ["/proc/erniekit"]),
    ],
    ids=["batch size 0", "unknown stage", "stage not built", "unknown key", "degree", "output not writable"],
)
def test_config(bench, run, tmp_path, keys, words):
    _, err = run("train", bench.config(tmp_path / "out", **keys), code=2)
    for word in words:
        assert word in err, err


def test_yaml_syntax_is_named_with_its_line(run, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("stage: SFT\nmax_steps: [1, 2\n")
    for verb in ("train", "check", "show"):
        _, err = run(verb, path, code=2)
        assert "broken.yaml" in err and ":" in err


def test_unknown_words(run):
    assert "Did you mean 'train'?" in run("trian", code=2)[1]
    assert "21B" in run("init", "--family", "ERNIE-4.5-22B-A3B", "--out", "never", code=2)[1]
    for verb in ("server", "webui", "plan"):
        assert verb in run(verb, "x.yaml", code=2)[1]
