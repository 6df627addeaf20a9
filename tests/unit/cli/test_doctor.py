"""doctor on invented machines: what it finds, the cure beside it, and the exit code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from erniekit.base import packages, resources
from erniekit.base.packages import Clash
from erniekit.base.resources import GIB, Gpu
from erniekit.cli import doctor
from erniekit.cli.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A sound machine; machine(name=value, ...) changes what its parts answer."""
    monkeypatch.chdir(tmp_path)
    answers = {
        "versions": {"paddlepaddle": "3.3.1"} | dict.fromkeys(doctor._REQUIRED, "9.9"), "clashes": [], "cuda": "",
        "memory": (16 * GIB, 8 * GIB), "quota": None, "gpus": [], "driver": None, "disk": (100 * GIB, True),
        "compiler": "/usr/bin/g++", "settings": {}, "cores": 4,
    }  # fmt: skip
    monkeypatch.setattr(packages, "version", lambda name: answers["versions"].get(name))
    monkeypatch.setattr(packages, "clashes", lambda _: answers["clashes"])
    for name in ("memory", "quota", "gpus", "driver"):
        monkeypatch.setattr(resources, name, lambda name=name: answers[name])
    monkeypatch.setattr(resources, "free_disk", lambda _: answers["disk"])
    monkeypatch.setattr("shutil.which", lambda _: answers["compiler"])
    monkeypatch.setattr("importlib.metadata.requires", lambda _: [f"nvidia-cuda-runtime-cu{answers['cuda']}==1"])
    monkeypatch.setattr("erniekit.base.runtime.settings", lambda: answers["settings"])
    monkeypatch.setattr("erniekit.base.runtime.num_cores", lambda: answers["cores"])
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "UTF-8")
    return answers


@pytest.fixture
def run(capsys):
    def call(*words: str, code: int = 0) -> str:
        assert main(["doctor", *map(str, words)]) == code
        out, err = capsys.readouterr()
        assert bool(err) == (code == 2)
        return out

    return call


def test_a_sound_machine(machine, run):
    out = run()
    assert {line.split()[0] for line in out.splitlines()} == {"ok"}
    assert "paddlepaddle 3.3.1" in out and "4 on 4 core(s)" in out


@pytest.mark.parametrize(
    ("change", "level", "text", "cure"),
    [
        ({"clashes": [Clash("a needs b<2; b 3 is installed", "pip install 'b<2'")]}, "problem", "a needs b<2", "b<2"),
        ({"versions": dict.fromkeys(doctor._REQUIRED, "1")}, "problem", "PaddlePaddle is not installed", "[cpu]"),
        ({"versions": {"paddlepaddle": "3.3.1"}}, "problem", "numpy, pyyaml", "pip install numpy pyyaml"),
        ({"memory": (2 * GIB, GIB)}, "warning", "1.0 GiB free of 2.0: little", "stop other programs"),
        ({"quota": 1.5}, "warning", "4 cores are seen and 1.5 may be kept busy", "MKL_NUM_THREADS=1"),
        ({"settings": {"OMP_NUM_THREADS": "4"}}, "warning", "OMP_NUM_THREADS=4", "unset OMP_NUM_THREADS"),
        ({"settings": {"MKL_NUM_THREADS": "9"}}, "warning", "MKL_NUM_THREADS=9 on 4", "MKL_NUM_THREADS=4"),
        ({"compiler": None}, "warning", "no g++", "apt install g++"),
        ({"disk": (GIB, True)}, "warning", "1.0 GiB free: little for checkpoints", "free space"),
        ({"disk": (GIB, False)}, "problem", "cannot be written", "another folder"),
        ({"gpus": [Gpu("H100", 80 * GIB)], "driver": (550, 54)}, "warning", "this Paddle computes on the CPU", "gpu"),
    ],
)  # fmt: skip
def test_what_is_found_and_its_cure(machine, run, change, level, text, cure):
    machine.update(change)
    lines = run(code=2 if level == "problem" else 0).splitlines()
    at = next(at for at, line in enumerate(lines) if text in line and line.startswith(level))
    assert lines[at + 1].strip().startswith("cure: ") and cure in lines[at + 1]


@pytest.mark.parametrize(
    ("cuda", "driver", "level", "text"),
    [
        ("12", (550, 54, 15), "ok", "driver 550.54.15 for CUDA 12"),
        ("12", (470, 82, 1), "problem", "driver 470.82.1 is too old for CUDA 12"),
        ("13", (550, 54, 15), "problem", "too old for CUDA 13"),
        ("12", None, "problem", "no NVIDIA driver is loaded"),
    ],
)
def test_the_driver_and_paddles_cuda(machine, run, cuda, driver, level, text):
    machine.update(versions=machine["versions"] | {"paddlepaddle-gpu": "3.3.1"}, cuda=cuda, driver=driver)
    del machine["versions"]["paddlepaddle"]
    line = next(line for line in run(code=2 if level == "problem" else 0).splitlines() if text in line)
    assert line.startswith(level)


def test_a_paddle_that_is_not_supported(machine, run):
    machine["versions"]["paddlepaddle"] = "2.6.2"
    assert "paddlepaddle 2.6.2 is not supported" in run(code=2)


def test_a_terminal_that_shows_no_chinese(machine, run, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "ANSI_X3.4-1968")
    out = run()
    assert "warning  text" in out and "PYTHONUTF8=1" in out


def test_a_run_that_fits_and_one_that_does_not(machine, run, tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: baidu/ERNIE-4.5-0.3B-PT\noutput_dir: out\n")
    machine["memory"] = (64 * GIB, 64 * GIB)
    out = run("run.yaml", "save_total_limit=2", "max_seq_len=128")
    assert "ok       run        0.36 billion parameters: 5.8 GiB at most at once" in out
    assert "weights (1.3), gradients (1.3), optimizer states (2.7)" in out
    assert "4.0 GiB for a checkpoint (at most 3 at a time)" in out
    machine["memory"] = (16 * GIB, 7 * GIB)
    assert "warning  run        0.36 billion" in run("run.yaml", "max_seq_len=128")
    assert "problem  run        0.36 billion" in run("run.yaml", "max_seq_len=4096", code=2)
    machine["memory"] = (16 * GIB, 3 * GIB)
    lora = run("run.yaml", "fine_tuning=LoRA", "compute_type=wint8", "max_seq_len=128")
    assert "gradients (0.0), optimizer states (0.0)" in lora and "0.0 for the model" in lora
    machine.update(memory=(64 * GIB, 64 * GIB), disk=(8 * GIB, True))
    assert "8.0 GiB free" in run("run.yaml", "save_total_limit=3", code=2)
    assert "is not known" in run("run.yaml", "model_name_or_path=apples")
    assert "cannot be trained yet" in run("run.yaml", "model_name_or_path=ERNIE-4.5-VL-28B-A3B")
    machine.update(disk=(800 * GIB, True))
    fp8 = run("run.yaml", "compute_type=fp8", "max_seq_len=128", code=2)
    assert "problem  run" in fp8 and "compute_type: fp8 needs GPUs" in fp8 and "cure: fp8_emulate=true" in fp8
    assert "fp8 needs" not in run("run.yaml", "compute_type=fp8", "fp8_emulate=true", "max_seq_len=128")


def test_the_range_of_paddle_is_that_of_setup_py():
    wanted = re.search(r'"paddlepaddle>=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text())
    assert wanted is not None
    assert tuple(tuple(map(int, text.split("."))) for text in wanted.groups()) == doctor._PADDLE


def test_nothing_heavy_is_imported(root):
    import subprocess

    code = "import sys; from erniekit.cli.main import main; main(['doctor']); print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("MODULES")[2].split())
    assert loaded & {"paddle", "numpy", "torch", "transformers", "datasets", "pyarrow", "sentencepiece"} == set()
