"""A wheel installed away from the source tree does the whole job: everything that the program reads is in it.

The wheel goes into a virtual environment of its own that sees this one's other packages, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="70.1")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders behind; they shall not lie in the repository
    source.mkdir()
    for name in ("setup.py", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "erniekit").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def erniekit_elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory):
    """Run the installed command in an empty folder; returns what it printed."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", symlinks=True)
    python = home / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home / "venv")}))
    site.mkdir(parents=True, exist_ok=True)
    # A path line shows the packages of this environment, but not what its own .pth files name (an editable erniekit).
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        command = [str(home / "venv" / "bin" / "erniekit"), *arguments]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    where = [python, "-c", "import erniekit; print(erniekit.__file__)"]
    found = subprocess.run(where, cwd=home, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(home)), f"this is not the installed package: {found}"
    run.home = home
    return run


def test_wheel_holds_every_file_that_is_read(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("erniekit/")}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "erniekit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so")
    }
    assert packed == wanted


def test_wheel_does_the_main_job(erniekit_elsewhere) -> None:
    run, home = erniekit_elsewhere, erniekit_elsewhere.home
    row = {"src": ["how are you", "and now"], "tgt": ["fine, thank you", "still fine"]}
    (home / "data.jsonl").write_text((json.dumps(row) + "\n") * 20)
    run("init", "--family", "micro-moe", "--train-tokenizer", "data.jsonl", "--out", "base")
    config = (
        "model_name_or_path: base\noutput_dir: run\nstage: SFT\nfine_tuning: Full\nmax_steps: 2\nmax_seq_len: 64\n"
        "train_dataset_path: data.jsonl\neval_dataset_path: data.jsonl\neval_generate: 1\nmax_new_tokens: 4\n"
    )
    (home / "run.yaml").write_text(config)
    assert "step 2/2 loss" in run("train", "run.yaml")
    assert "eval_loss" in run("eval", "run.yaml", "model_name_or_path=run")
    run("export", "run.yaml")
    run("verify", "run/export")
