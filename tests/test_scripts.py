"""The scripts that README.md names: shell scripts are clean, and the quickstart's data is split without a leak."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    done = subprocess.run([SHELLCHECK, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_bash_understands(script: Path) -> None:
    """What is left to check where shellcheck has no wheel."""
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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


def run_script(name: str, *arguments: str | Path, code: int = 0) -> dict:
    """What a script prints as JSON."""
    command = [sys.executable, f"scripts/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_budget_of_released_models_stands_beside_their_published_least() -> None:
    table = run_script("bench_memory", "--only")["published"]
    assert len(table) > 10
    weights = {(row["model"], row["max_seq_len"], row["cards"]): row["gb_of_a_card"]["weights"] for row in table}
    assert 0.6 < weights["ERNIE-4.5-0.3B", 8192, 1] < 0.8
    assert 165 / 4 < weights["ERNIE-4.5-300B-A47B", 8192, 4] < 180 / 4  # wint4/8, and adapters
    assert 601 / 96 < weights["ERNIE-4.5-300B-A47B", 8192, 96] < 8  # stage 3: what is not in layers is cut by 8 alone
    assert all(row["fits"] for row in table)


def test_the_bench_of_formats_tells_speed_memory_and_error() -> None:
    sizes = ("--inputs", "128", "--outputs", "256", "--rounds", "2")
    found = run_script("bench_quant", *sizes, "--formats", "wint8", "fp8, blocks of 128")
    assert found["weight"] == [128, 256] and found["commit"] and found["versions"]["paddle"]
    assert list(found["formats"]) == ["wint8", "fp8, blocks of 128"]
    for figures in found["formats"].values():
        assert 8 < figures["bits_per_weight"] < 8.3 and 0 < figures["mse"] < 1e-3
        for name in ("quantise_gb_per_s", "decode_gb_per_s", "kernel_gb_per_s", "quantise_million_weights_per_s"):
            assert 0 < figures[name]["least"] <= figures[name]["median"] <= figures[name]["most"]
        assert figures["peak_mb"].keys() == {"quantise", "decode"}


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows in the forms of the real archive, and a micro model, made of random words."""
    from erniekit.checkpoint.create import create

    folder, rng = tmp_path_factory.mktemp("archive"), random.Random(1)

    def said() -> str:
        return " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(12))

    def pair() -> dict:
        answers = {side: {"from": "gpt", "value": said()} for side in ("chosen", "rejected")}
        return {"conversations": [{"from": "human", "value": said()}], **answers}

    def judged() -> dict:
        talk = [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
        return {"messages": talk, "label": rng.random() < 0.5}

    def instruction() -> dict:
        return {"instruction": said(), "input": "", "output": said()}

    for kind, row in (("dpo", pair), ("kto", judged), ("alpaca", instruction)):
        for language in ("en", "zh"):
            rows = json.dumps([row() for _ in range(30)])
            (folder / f"{kind}_{language}_demo.json").write_text(rows, encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(said() for _ in range(200)), encoding="utf-8")
    create("micro-moe", folder / "model", tokenizer_texts=[folder / "text.txt"])
    return folder


def test_a_short_proof_of_training_resumes_bit_equal(small_archive: Path) -> None:
    """The whole of scripts/prove_align.py for one case; random words teach nothing, so that only resuming is judged."""
    command = [sys.executable, "scripts/prove_align.py", "--only", "dpo_lora", "--seeds", "1", "--max-steps", "3"]
    command += ["--model", str(small_archive / "model"), "--data", str(small_archive)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)["cases"]["dpo_lora"]
    assert found["resumes_bit_equal"]
    assert found["runs"][0]["steps"] == 3


def test_kernels_are_not_timed_without_a_hopper_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = run_script("bench_kernels", "--out", tmp_path / "kernels.json")
    assert found["status"].startswith("not run: ")
    assert "kernels" not in found
    assert json.loads((tmp_path / "kernels.json").read_text()) == found


@pytest.fixture
def bench_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_kernels")


def test_a_launch_is_timed_alone_and_finds_an_empty_cache(
    bench_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    times = iter([5.0, 1.0, 2.0])

    def event(*, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        return SimpleNamespace(record=lambda: done.append("event"), elapsed_time=lambda _: next(times))

    cuda = SimpleNamespace(
        Event=event, synchronize=lambda: done.append("wait"), _sleep=lambda _: done.append("sleep")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    other = SimpleNamespace(zero_=lambda: done.append("flush"))
    assert bench_kernels.milliseconds(lambda: done.append("run"), 3, other=other) == 2.0
    assert done == ["wait", "sleep", *["flush", "event", "run", "event"] * 3, "wait"]


def test_figures_of_kernels(bench_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes 2, 4 and 3 ms, the peer 8: medians, spread and shares of an H200, contender by contender. The first
    round, 99 ms, is not counted."""
    order: list[str] = []
    case = SimpleNamespace(
        settings=(None,), run=lambda _: order.append("ours"), peers={"torch": lambda: order.append("torch")},
        bytes=6 * 10**9, flops=3 * 10**12, numbers="fp8",
    )  # fmt: skip
    answers = iter([99.0, 99.0, 2.0, 8.0, 4.0, 8.0, 3.0, 8.0])
    monkeypatch.setattr(bench_kernels, "milliseconds", lambda run, _, **__: (run(), next(answers))[1])
    given = {"repeats": 1, "chip": bench_kernels.CHIPS["NVIDIA H200"], "other": None}
    found = bench_kernels.timed(case, rounds=3, **given)
    assert order == ["ours", "torch"] * 4
    assert found["ours"]["ms"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert found["ours"]["tflops"] == pytest.approx(1000)
    assert found["ours"]["gb_per_s"] == pytest.approx(2000)
    assert found["ours"]["share_of_chip"] == pytest.approx(1000 / 1979)
    assert found["torch"]["tflops"] == pytest.approx(375)
    case.flops = 0
    answers = iter([99.0, 99.0, 3.0, 8.0])
    assert bench_kernels.timed(case, rounds=1, **given)["ours"]["share_of_chip"] == pytest.approx(2.0 / 4.8)


@pytest.mark.parametrize(
    ("kernels", "code"), [([{"correct": True}], 0), ([{"correct": True}, {"correct": False}], 1), ([{}], 0)]
)
def test_a_wrong_kernel_shows_in_the_exit_code(bench_kernels, monkeypatch, capsys, kernels, code) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    monkeypatch.setattr(bench_kernels, "measure", lambda _: {"kernels": kernels})
    assert bench_kernels.main() == code
    assert json.loads(capsys.readouterr().out) == {"kernels": kernels}


def test_a_name_that_no_kernel_has(bench_kernels, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--only", "fp4"])
    monkeypatch.setattr(bench_kernels, "measure", lambda _: {"kernels": []})
    with pytest.raises(SystemExit, match="no kernel has 'fp4' in its name"):
        bench_kernels.main()
