"""check, show, env, and what the other verbs hand to the parts that do the work."""

from pathlib import Path

import pytest

from erniekit.cli.main import main
from erniekit.cli.verbs import RANKS, VERBS
from erniekit.recipes.export import Several

GOOD = "seed: 1\nlearning_rate: 1e-4\nmodel_name_or_path: nowhere/ERNIE-4.5-0.3B-PT\nrelease_grads: true\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("erniekit.base.runtime.prepare", lambda **_: None)

    def run(*words, code=0):
        assert main([str(word) for word in words]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return "run.yaml"


def test_verbs_that_take_the_options_of_ranks_start_ranks():
    named = [verb.name for verb in VERBS.values() if verb.takes_ranks]
    assert named == [verb.name for verb in VERBS.values() if {*RANKS} <= {*verb.options}]
    assert named == ["train", "eval", "export", "reproduce"]


def test_check_judges_the_file_only(run, config):
    out = run("check", config, "stage=PPO", "tensor_parallel_degree=8").out
    assert "note: accepted and not acted on" in out
    assert "not built yet in this version; `train` refuses it:\n  command line: stage: PPO" in out
    assert "not checked here:\n  run.yaml:3: model_name_or_path: 'nowhere/ERNIE-4.5-0.3B-PT' is not here;" in out
    assert "hf download nowhere/ERNIE-4.5-0.3B-PT" in out
    assert "command line: tensor_parallel_degree: 8 needs 8 devices" in out
    assert out.endswith("run.yaml: fine\n")


def test_check_of_a_file_with_nothing_to_say(run, config):
    Path(config).write_text("seed: 1\n")
    assert run("check", config).out == "run.yaml: fine\n"


def test_check_files_makes_absences_errors(run, config, tmp_path):
    (tmp_path / "nowhere").mkdir()
    assert "run.yaml:3: model_name_or_path" in run("check", config, "--files", code=2).err
    (tmp_path / "nowhere" / "ERNIE-4.5-0.3B-PT").mkdir(parents=True)
    assert run("check", config, "--files").out.endswith("fine\n")


def test_show_names_every_origin(run, config):
    Path("base.yaml").write_text("weight_decay: 0.1\n")
    Path(config).write_text(GOOD + "extends: base.yaml\nwandb_api_key: hush\n")
    out = run("show", config, "max_steps=7").out
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert rows["learning_rate"] == ["0.0001", "run.yaml:2"]
    assert rows["weight_decay"] == ["0.1", "extends base.yaml:1"]
    assert rows["max_steps"] == ["7", "command line"]
    assert rows["batch_size"] == ["1", "default"]
    assert rows["wandb_api_key"] == ["(secret)", "run.yaml:6"]
    assert "hush" not in out
    assert len(rows) > 370


def test_show_changed(run, config):
    out = run("show", config, "--changed", "stage=SFT").out
    assert [line.split()[0] for line in out.splitlines()] == [
        "model_name_or_path", "stage", "seed", "learning_rate", "release_grads",
    ]  # fmt: skip
    assert len({line.index("  run.yaml") for line in out.splitlines() if "  run.yaml" in line}) == 1  # aligned


def test_env(run):
    rows = dict(line.split(maxsplit=1) for line in run("env").out.splitlines())
    for name in ("erniekit", "python", "paddlepaddle", "numpy", "sentencepiece", "system", "cpu", "cores", "memory"):
        assert rows[name]
    assert rows["paddlepaddle"][0].isdigit()


def test_train_refuses_all_at_once(run, config):
    err = run("train", config, "stage=PPO", "compute_type=fp16", code=2).err
    assert len(err.splitlines()) == 4  # the model would be downloaded
    for part in ("stage: PPO", "compute_type: fp16", "train_dataset_path", "output_dir"):
        assert part in err


@pytest.fixture
def calls(monkeypatch):
    """Recorded calls in place of the functions that do the work."""
    recorded = []

    def record(path, result=None):
        def function(*args, **options):
            recorded.append((args, options))
            return result

        monkeypatch.setattr(path, function)
        return recorded

    return record


def test_train_hands_over_the_config(run, config, calls, tmp_path):
    (tmp_path / "nowhere" / "ERNIE-4.5-0.3B-PT").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text("")
    recorded = calls("erniekit.recipes.train")
    run("train", config, "train_dataset_path=a.jsonl", "output_dir=out", "learning_rate=2e-4")
    (((handed,), _),) = recorded
    assert (handed.optimizer.learning_rate, handed.train.seed) == (2e-4, 1)


def test_export(run, config, calls):
    recorded = calls("erniekit.recipes.export.export")
    run("export", config, "output_dir=out")
    run("export", config, "output_dir=out", "--to", "paddle", "--out", "there", "--checkpoint", "5")
    words = ("--merge", "a=0.7", "b/c=-0.3", "--method", "dare", "--density", "0.2")
    run("export", config, "output_dir=out", "--adapter")
    run("export", config, "output_dir=out", *words)
    usual = {"to": "pt", "out": None, "step": None, "adapter_only": False, "several": None}
    several = Several(((Path("a"), 0.7), (Path("b/c"), -0.3)), "dare", 0.2)
    assert [options for _, options in recorded] == [
        usual, {**usual, "to": "paddle", "out": "there", "step": 5}, {**usual, "adapter_only": True},
        {**usual, "several": several},
    ]  # fmt: skip
    assert "leave --adapter and --checkpoint out" in run("export", config, *words, "--adapter", code=2).err
    assert "'x' is not a number" in run("export", config, "--merge", "a=x", code=2).err
    assert "--method: 'mean' is not known" in run("export", config, *words[:3], "--method", "mean", code=2).err


def test_convert(run, calls):
    recorded = calls("erniekit.checkpoint.convert.convert")
    run("convert", "in", "out", "--to", "paddle")
    assert recorded == [((Path("in"), Path("out")), {"to": "paddle"})]
    assert "--to LAYOUT is missing" in run("convert", "in", "out", code=2).err


def test_split_of_a_folder_and_of_a_config(run, config, calls, tmp_path):
    recorded = calls("erniekit.checkpoint.split.split", result=3)
    (tmp_path / "model").mkdir()
    assert run("split", "model", "--max-shard-size", "500MB").out == "model/split_export: 3 file(s) written\n"
    run("split", "model", "--out", "there")
    assert "output_dir gone does not exist" in run("split", config, "output_dir=gone", code=2).err
    (tmp_path / "model" / "config.json").write_text("{}")
    run("split", config, "output_dir=model", "max_shard_size=2")
    assert recorded == [
        ((Path("model"), Path("model/split_export")), {"max_shard_bytes": 5 * 10**8}),
        ((Path("model"), Path("there")), {"max_shard_bytes": 5 * 10**9}),
        ((Path("model"), Path("model/split_export")), {"max_shard_bytes": 2 * 10**9}),
    ]
    assert "is not a size" in run("split", "model", "--max-shard-size", "big", code=2).err


def test_resize_vocab(run, calls):
    from erniekit.checkpoint.resize import Resized

    recorded = calls("erniekit.checkpoint.resize.resize_vocab", result=Resized({"<a>": 320}, 320, 384))
    out = run("resize-vocab", "model", "--add-tokens", "<a>", "b", "--pad-to-multiple", "64").out
    assert out == "     320 <a>\nmodel-resized: written; vocab_size 320 -> 384\n"
    options = {"words": ["<a>", "b"], "pad_to_multiple": 64}
    assert recorded == [((Path("model"), Path("model-resized")), options)]
    assert "--add-tokens WORD ... is missing" in run("resize-vocab", "model", code=2).err


def test_migrate_prints_or_writes(run, tmp_path):
    (tmp_path / "theirs.yaml").write_text("finetuning_type: lora\ncutoff_len: 512\nplot_loss: true\n")
    printed = run("migrate", "theirs.yaml").out
    assert "# 3 keys of LLaMA-Factory: 2 kept, 0 changed, 1 lost\n" in printed
    out = run("migrate", "theirs.yaml", "--from", "llamafactory", "--out", "ours.yaml").out
    assert (tmp_path / "ours.yaml").read_text() == printed
    assert "lost:\n  plot_loss: true (curves are in the report of the run)\n" in out
    assert run("check", "ours.yaml").out.endswith("ours.yaml: fine\n")
    assert "nothing is overwritten" in run("migrate", "theirs.yaml", "--out", "ours.yaml", code=2).err
    assert "--from: 'axolotl' is not known" in run("migrate", "theirs.yaml", "--from", "axolotl", code=2).err


def test_verify(run, calls):
    calls("erniekit.checkpoint.verify.verify", result=[])
    assert run("verify", "folder").out == "folder: fine\n"
    calls("erniekit.checkpoint.verify.verify", result=["a is missing", "b is corrupt"])
    assert run("verify", "folder", code=2).err == "error: a is missing\nerror: b is corrupt\n"


def test_init(run, calls):
    recorded = calls("erniekit.checkpoint.create.create")
    run("init", "--family", "tiny-moe", "--out", "x")
    run("init", "--family", "tiny-moe", "--out", "x", "--seed", "3", "--train-tokenizer", "a", "b",
        "--vocab-size", "512", "--dtype", "float32", "--layout", "paddle", "--tokenizer", "t")  # fmt: skip
    assert [args for args, _ in recorded] == [("tiny-moe", Path("x"))] * 2
    assert [options for _, options in recorded] == [
        {"seed": 0, "layout": "pt", "dtype": "bfloat16", "vocab_size": None, "tokenizer": None, "tokenizer_texts": ()},
        {"seed": 3, "layout": "paddle", "dtype": "float32", "vocab_size": 512, "tokenizer": "t",
         "tokenizer_texts": ["a", "b"]},
    ]  # fmt: skip


def test_chat_with_a_folder_and_with_a_config(run, config, calls, tmp_path):
    pytest.importorskip("paddle")
    recorded = calls("erniekit.recipes.chat.chat")
    (tmp_path / "model").mkdir()
    run("chat", "model", "max_new_tokens=5")
    run("chat", config, "max_new_tokens=6")
    ((handed,), of_folder), ((again,), of_config) = recorded
    assert (of_folder, of_config) == ({"folder": Path("model")}, {"folder": None})
    assert (handed.generate.max_new_tokens, again.generate.max_new_tokens) == (5, 6)
    assert "top_p: 2.0 is too large" in run("chat", "model", "top_p=2", code=2).err


def test_eval(run, config, calls, tmp_path):
    pytest.importorskip("paddle")
    recorded = calls("erniekit.recipes.evaluate.evaluate")
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "nowhere" / "ERNIE-4.5-0.3B-PT").mkdir(parents=True)
    run("eval", config, "eval_dataset_path=e.jsonl", "eval_generate=3")
    (((handed,), _),) = recorded
    assert handed.generate.eval_generate == 3
