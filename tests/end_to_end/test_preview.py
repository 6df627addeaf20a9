"""`preview` shows what `train` trains on, without Paddle and without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import dialogue, write_rows


@pytest.fixture
def config(bench, tmp_path):
    rows = [dialogue(number) for number in range(120)]
    rows[7] = {"src": ["<b>say</b>"], "tgt": ["nothing"], "label": [0]}
    data = write_rows(tmp_path / "rows.jsonl", rows)
    return bench.config(tmp_path / "out", train_dataset_path=data, eval_dataset_path=None, validation_split=0.1)


def test_in_the_terminal(config, run, tmp_path):
    out, _ = run("preview", config)
    assert "training data: 107 samples from 1 file" in out
    assert "⟦" in out and "step 0, row 0: " in out and "step 0, row 2: " in out and "\x1b" not in out
    assert f"  {tmp_path}/rows.jsonl:8: dropped: no turn has label 1" in out
    assert "samples of step" not in out
    assert not (tmp_path / "out").exists()


def test_the_samples_of_a_step_are_those_that_training_takes(config, run, tmp_path):
    out, _ = run("preview", config, "--step", 3, "--rows", 1)
    named = out.partition("samples of step 3:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.partition(": ")[0] for line in named] == [f"  row {number}" for number in range(4)]
    from erniekit.config.load import load_config
    from erniekit.data.build import build_train_data
    from erniekit.data.tokenizer import Tokenizer

    cfg = load_config(config)
    tokenizer = Tokenizer.from_folder(cfg.model.model_name_or_path)
    data = build_train_data(cfg.data, tokenizer, stage="SFT", seed=7, rows_per_step=4)
    assert ", ".join(line.partition(": ")[2] for line in named) == ", ".join(data.sample_names(3))
    assert "step 3, row 0: " in out
    out, _ = run("preview", config, "--step", 1, "--rows", 1, "--nproc", 4, "tensor_parallel_degree=2")
    assert out.count("\n  row ") == 8, "the rows of two ranks; two share theirs"


def test_as_a_page(config, run, tmp_path):
    out, _ = run("preview", config, "--html", tmp_path / "page.html", "--step", 2)
    assert str(tmp_path / "page.html") in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in ("Samples of step 2", "step 2, row 0", "rows.jsonl:8", "no turn has label 1", "</html>"):
        assert words in page
    assert "http" not in page and "<script" not in page and "<b>say</b>" not in page


def test_pairs(config, run, tmp_path):
    rows = [{"question": f"How many, {n}?", "chosen": f"It is {n}.", "rejected": f"Is it {n}?"} for n in range(20)]
    rows[4]["rejected"] = rows[4]["chosen"]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    words = (f"train_dataset_path={data}", "train_dataset_type=alpaca", "max_dropped_fraction=0.1", "stage=DPO")
    out, _ = run("preview", config, *words, "--step", 0, "--rows", 1)
    for part in ("[prompt] ", "[chosen, better by 1] ", "[rejected] ", "samples of step 0:"):
        assert part in out
    assert f"  {tmp_path}/pairs.jsonl:5: dropped: two of the answers are the same" in out
    run("preview", config, *words, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<p class="ek-part">prompt</p>') == page.count('<p class="ek-part">rejected</p>') > 0
    out, _ = run("preview", config, *words, "share_prompt=false", "--rows", 1)
    assert "[prompt]" not in out and "How many" in out.partition("[rejected] ")[2]


def test_leaks_are_shown(bench, config, run, tmp_path):
    copy = write_rows(tmp_path / "copy.jsonl", [dialogue(number) for number in range(3)])
    _, err = run("preview", config, f"eval_dataset_path={copy}", "validation_split=0")
    assert "all 3 evaluation samples stand in the training data word for word" in err
    _, err = run("preview", config, f"eval_dataset_path={copy}", "validation_split=0", "check_leaks=false")
    assert "word for word" not in err


@pytest.mark.parametrize("words", [["--step", "-1"], ["--rows", "0"], ["stage=DPO"], ["model_name_or_path=no/where"]])
def test_what_is_refused(config, run, words):
    run("preview", config, *words, code=2)


def test_it_needs_no_paddle_and_no_weights(bench, config, root, tmp_path):
    folder = tmp_path / "tokenizer only"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((bench.model / "tokenizer.model").read_bytes())
    program = (
        "import sys; from erniekit.cli.main import main; "
        f"code = main(['preview', {str(config)!r}, {json.dumps(f'model_name_or_path={folder}')}]); "
        "print('loaded:', 'paddle' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: False\n")


def test_the_ledger_of_a_run_is_written(config, run, tmp_path):
    run("train", config, "max_steps=1")
    (line,) = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "name": f"{tmp_path}/rows.jsonl:8", "action": "dropped", "reason": "no turn has label 1",
    }  # fmt: skip
