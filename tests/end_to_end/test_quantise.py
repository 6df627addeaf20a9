"""`export --quantize` from the command line: every format, an adapter on the way, kill -9, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from erniekit.checkpoint import quantise
from erniekit.checkpoint.create import create
from erniekit.checkpoint.ernie45 import layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import SharedFile
from erniekit.checkpoint.quantised import FORMATS
from erniekit.checkpoint.quantised_folder import QuantisedFolder
from erniekit.checkpoint.source import made
from erniekit.config import families

ROOT = Path(__file__).parents[2]
SMALL = families.FAMILIES["micro-moe"] | {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_nextn_predict_layers": 1,
    "use_bias": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def small(bench, tmp_path_factory) -> Path:
    """A mixture of experts whose sizes fit every format, with all that a model may have: depths of prediction, biases,
    correction biases, a head of its own. (That of the bench is tied and has none.)"""
    path = tmp_path_factory.mktemp("small") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "small-moe", SMALL)
        create("small-moe", path, tokenizer_texts=[bench.folder / "train.jsonl"])
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_format(bench, run, small, tmp_path):
    text = ("--calibration", bench.folder / "train.jsonl", "--calibration-tokens", 500)
    bits, kept, origin = {}, set(), Folder.open(small)
    plain = layout_table(origin.disk_config, "paddle", origin.form.in_layout(origin.disk_config, "paddle"))
    for name in FORMATS:
        out, _ = run("export", small, "--quantize", name, *text, "--out", tmp_path / name)
        assert f"exported {small} to {tmp_path / name} ({name})" in out
        run("verify", tmp_path / name)
        report = json.loads((tmp_path / name / "erniekit_quantisation.json").read_bytes())
        bits[name] = report["bits_per_quantised_weight"]
        assert report["model"] == str(small.resolve())
        for row in report["tensors"][-3:]:  # what is read is as far from the weight as the report says
            weight, tensor = made(plain.tensors[row["tensor"]], np.dtype(np.float32), origin), row["tensor"]
            error = np.square(QuantisedFolder.open(tmp_path / name).read_tensor(tensor) - weight).mean()
            assert error == pytest.approx(row["mse"], rel=1e-4)
        assert report["relative_error"] < {"wint8": 0.01, "fp8": 0.03}.get(name, 0.4)
        assert ("500 tokens" in out) == (name not in ("wint8", "wint4"))
        assert (tmp_path / name / "tokenizer.model").is_file()
        kinds = {row["tensor"]: row["kind"] for row in report["tensors"]}
        assert {"ernie.mtp_linear_proj.0.weight", "ernie.mtp_block.0.self_attn.o_proj.weight"} <= kinds.keys()
        found = QuantisedFolder.open(tmp_path / name)
        for tensor in plain.tensors.keys() - kinds.keys():
            exact = made(plain.tensors[tensor], np.dtype(np.float32), origin)
            np.testing.assert_array_equal(found.read_tensor(tensor).astype(np.float32), exact)
            kept.add(tensor.rpartition(".")[2])
    assert kept == {"weight", "bias", "e_score_correction_bias"} and "lm_head.weight" in plain.tensors
    assert max(bits["wint2"], bits["wint2.5"]) < bits["w4a8"] < bits["fp8"] < bits["wint8"] < 8.6
    assert bits["wint4"] < 4.5
    run("export", small, "--quantize", "fp8", "--group-size", 128, "--out", tmp_path / "blocks")
    assert (
        QuantisedFolder.open(tmp_path / "blocks").scheme.kind_of("ernie.layers.0.mlp.down_proj.weight") == "fp8_blocks"
    )


def test_an_adapter_is_merged_on_the_way(bench, run, tmp_path):
    """Quantising what a LoRA run left is quantising what `export` makes of it; in fp32, so that neither is rounded."""
    create("micro-moe", tmp_path / "base", dtype="float32", tokenizer=bench.model)
    keys = {"fine_tuning": "LoRA", "max_steps": 2, "model_name_or_path": tmp_path / "base"}
    config = bench.config(tmp_path / "run", **keys)
    run("train", config)
    run("export", config)
    out, _ = run("export", config, "--quantize", "wint4", "--group-size", 16)
    assert f"to {tmp_path / 'run' / 'export-wint4'} (wint4)" in out
    run("export", tmp_path / "run" / "export", "--quantize", "wint4", "--group-size", 16, "--out", tmp_path / "twice")
    one, other = (
        (path / "model.safetensors").read_bytes() for path in (tmp_path / "run/export-wint4", tmp_path / "twice")
    )
    assert one == other
    run("export", config, "--quantize", "wint8", "--checkpoint", 2)
    assert (tmp_path / "run" / "export-2-wint8" / "config.json").is_file()


def test_kill_9_and_the_same_command(bench, run, small, tmp_path):
    """Killed while it works, and then: the bytes of an export that nothing disturbed."""
    run("export", small, "--quantize", "wint4", "--out", tmp_path / "straight")
    slow = (
        "import sys, time; from erniekit.checkpoint import quantise; real = quantise._Work._tensor\n"
        "quantise._SECONDS = 0.0; quantise.write_quantised.__kwdefaults__['every'] = 0.0\n"
        "quantise._Work._tensor = lambda *given: (time.sleep(0.05), real(*given))[1]\n"
        "from erniekit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["export", str(small), "--quantize", "wint4", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    journal, until = tmp_path / "killed" / ".saving" / ".journal", time.monotonic() + 60
    while not (journal.is_file() and journal.read_bytes().count(b"rows") > 5) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "config.json").exists()
    _, err = run(*words)
    assert "going on with an export that was interrupted" in err
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quantize", "wint5"], ("'wint5' is not known", "Did you mean 'wint")),
        (["--quantize", "wint4", "--group-size", "48"], ("wint4 does not fit", "takes a multiple of 48")),
        (["--quantize", "wint8", "--to", "pt"], ("-Paddle form only",)),
        (["--quantize", "wint8", "--adapter"], ("--quantize and --adapter exclude each other",)),
        (["--quantize", "w4a8"], ("--calibration FILE",)),
        (["--quantize", "w4a8", "--calibration", "absent.jsonl"], ("absent.jsonl: there is no such file",)),
        (["--quantize", "wint8", "--checkpoint", "x"], ("--checkpoint: 'x' is not a whole number",)),
        (["--quantize", "wint8", "--checkpoint", "3"], ("--checkpoint takes one of a run", "is a folder")),
        (["--quantize", "wint8", "--calibration-tokens", "0"], ("at least 1",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_and_leaves_nothing(run, small, tmp_path, words, said):
    _, err = run("export", small, *words, "--out", tmp_path / "new" / "out", code=2)
    for text in said:
        assert text in err
    assert not (tmp_path / "new").exists()


def test_text_that_changed_begins_anew(bench, run, tmp_path, monkeypatch):
    """An export that is half calibrated by one text does not go on with another."""
    text = tmp_path / "text.jsonl"
    words = ("export", bench.model, "--quantize", "fp8", "--calibration", text, "--calibration-tokens", 100, "--out")
    shutil.copy(bench.folder / "train.jsonl", text)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantise._Work, "_tensor", interrupted)
        run(*words, tmp_path / "out", code=130)
    assert "going on with an export that was interrupted" in run(*words, tmp_path / "out")[1]
    with monkeypatch.context() as patch:
        patch.setattr(quantise._Work, "_tensor", interrupted)
        run(*words, tmp_path / "other", code=130)
    shutil.copy(bench.folder / "text.jsonl", text)
    assert "an export with other settings was not finished there" in run(*words, tmp_path / "other")[1]


def test_sizes_that_do_not_fit_are_named(bench, run, tmp_path):
    """Of the micro model: 64 hidden numbers, experts of 32."""
    for words, said in {
        ("wint2",): "experts.0.down_proj.weight has 32; wint2 takes a multiple of 64",
        ("fp8", "--group-size", 128): "layers.0.self_attn.qkv_proj.weight has 64; fp8_blocks takes a multiple of 128",
    }.items():
        _, err = run("export", bench.model, "--quantize", *words, "--out", tmp_path / "out", code=2)
        assert said in err
    assert not (tmp_path / "out").exists()


def test_a_weight_with_infinity_is_named_with_its_file(bench, run, small, tmp_path):
    """Also where the model is asked first what goes into its weights."""
    shutil.copytree(small, tmp_path / "bad")
    (tmp_path / "bad" / "manifest.json").unlink()
    file = tmp_path / "bad" / "model.safetensors"
    name = "model.layers.1.self_attn.k_proj.weight"
    SharedFile(file).array(name)[3, 5] = np.inf
    for words in (["wint8"], ["fp8", "--calibration", bench.folder / "train.jsonl", "--calibration-tokens", 100]):
        _, err = run("export", tmp_path / "bad", "--quantize", *words, "--out", tmp_path / "out", code=2)
        assert f"{file}: '{name}' holds NaN or infinity" in err
        assert not (tmp_path / "out").exists()


def test_one_of_several_ranks_quantises(run, small, tmp_path):
    words = ["export", str(small), "--quantize", "wint4", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "erniekit", *words, str(tmp_path / "two"), "--nproc", "2"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exported") == 1
    run(*words, tmp_path / "one")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_text_that_is_too_short_is_told(bench, run, small, tmp_path):
    (tmp_path / "few.txt").write_text("one two three")
    words = ("export", small, "--quantize", "fp8", "--calibration", tmp_path / "few.txt", "--out", tmp_path / "out")
    _, err = run(*words, code=2)
    assert "few.txt has 3 tokens, and 4,096 are needed" in err and "--calibration-tokens 3" in err
    assert not (tmp_path / "out").exists()
    run(*words, "--calibration-tokens", 3)


def test_a_dialogue_whose_parts_are_text_is_a_dialogue(bench, run, tmp_path):
    parts = [{"type": "text", "text": "say red and blue"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red and blue"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    text = ("--calibration", tmp_path / "rows.jsonl", "--calibration-tokens", 5)
    run("export", bench.model, "--quantize", "fp8", *text, "--out", tmp_path / "out")


def test_options_without_their_format_are_refused(bench, run, tmp_path):
    _, err = run("export", bench.config(tmp_path / "run"), "--group-size", 64, code=2)
    assert "--group-size is about --quantize KIND" in err
    _, err = run("export", bench.model, "--to", "paddle", code=2)
    assert f"{bench.model}: is a folder; `export` takes the YAML file of a run" in err
