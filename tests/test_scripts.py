"""The scripts that README.md names: shell scripts are clean, and the quickstart's data is split without a leak."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    done = subprocess.run([SHELLCHECK, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def quickstart_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("chatterbot_corpus")
    pytest.importorskip("chitchat_dataset")
    folder = tmp_path_factory.mktemp("quickstart")
    make_data(folder)
    return folder


def make_data(folder: Path) -> str:
    command = [sys.executable, "scripts/quickstart_data.py", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_quickstart_data_is_erniekit_sft(quickstart_data: Path) -> None:
    train, held_out = rows(quickstart_data / "train.jsonl"), rows(quickstart_data / "eval.jsonl")
    assert len(train) > 4000
    assert len(held_out) > 90
    assert all(len(row["src"]) == len(row["tgt"]) and all(row["src"] + row["tgt"]) for row in train + held_out)
    assert any(len(row["src"]) > 3 for row in train)  # conversations of several turns are kept whole
    assert any("\u4e00" <= row["src"][0][0] <= "\u9fff" for row in train)  # Chinese is there


def test_no_question_stands_on_both_sides(quickstart_data: Path) -> None:
    sides = [rows(quickstart_data / f"{side}.jsonl") for side in ("train", "eval")]
    firsts = [{"".join(filter(str.isalnum, row["src"][0].casefold())) for row in side} for side in sides]
    assert firsts[0] & firsts[1] == set()
    for side in sides:
        assert len({json.dumps(row) for row in side}) == len(side)


def test_a_second_run_reuses_the_data(quickstart_data: Path) -> None:
    before = {path.name: path.read_bytes() for path in quickstart_data.iterdir()}
    assert make_data(quickstart_data).startswith("reusing")
    assert {path.name: path.read_bytes() for path in quickstart_data.iterdir()} == before
