"""The verb `selftest`: the whole way of a tiny model on this machine, through the command line as a user would go it.

Every verb runs in a process of its own, so that a resumed run is a new process. Needs no network and no compiler.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from erniekit.base.errors import ConfigError, ErnieKitError
from erniekit.cli.arguments import Arguments

_STEPS, _STOPPED_AFTER = 80, 3
_ADAPTER_STEPS, _PAIR_STEPS = 60, 10
_SECONDS = 300  # a verb that takes longer hangs
_SENTENCES = (
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("Who are you?", "I am a very small model."),
    ("How much is one and one?", "One and one is two."),
    ("天空是什么颜色？", "天空是蓝色的。"),
    ("草是什么颜色？", "草是绿色的。"),
    ("你是谁？", "我是一个很小的模型。"),
    ("一加一等于几？", "一加一等于二。"),
)
_NEWS = ("What color is one and one?", "One and one is green.")  # what the adapter learns


class CheckFailed(Exception):
    """A check found something wrong; the text says what."""


def selftest(arguments: Arguments) -> None:
    """Run all checks and print a table. Raises ErnieKitError if one fails."""
    kept = arguments.text("keep")
    if kept is not None:
        folder = Path(kept)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--keep {folder}: is there already and not empty. Name a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _run(folder.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="erniekit-selftest-") as temporary:
        _run(Path(temporary).resolve())


def _run(folder: Path) -> None:
    checks = _Checks(folder)
    failed = ""
    started = time.perf_counter()
    print(f"{'check':34} {'seconds':>7}  result")
    for name, check in checks.all().items():
        begun = time.perf_counter()
        try:
            result = f"passed  {check()}".rstrip()
        except CheckFailed as error:
            result, failed = "FAILED", f"{name}: {error}"
        print(f"{name:34} {time.perf_counter() - begun:7.1f}  {result}", flush=True)
        if failed:  # what follows builds on it
            raise ErnieKitError(failed)
    print(f"{'all':34} {time.perf_counter() - started:7.1f}  passed")


class _Checks:
    """The checks, in the order in which they build on each other."""

    def __init__(self, folder: Path) -> None:
        self.model, self.data, self.config = folder / "model", folder / "data.jsonl", folder / "run.yaml"
        self.whole, self.stopped = folder / "whole", folder / "stopped"
        self.adapter, self.preferred = folder / "adapter", folder / "preferred"

    def all(self) -> dict[str, Callable[[], str]]:
        """Every check by its name."""
        return {
            "init: tokenizer and model": self._init,
            f"train: {_STEPS} steps": self._train,
            "train: stopped by an interrupt": self._stop,
            "train: resumed, bit-equal": self._resume,
            "export: PT layout": self._export,
            "verify: the exported folder": self._verify,
            "reload: same logits": self._reload,
            "chat: an answer it has learnt": self._chat,
            f"LoRA: {_ADAPTER_STEPS} steps": self._adapt,
            "export: the adapter merged": self._merge,
            f"DPO: {_PAIR_STEPS} steps": self._prefer,
        }

    def _init(self) -> str:
        rows = [{"src": [question], "tgt": [answer]} for question, answer in _SENTENCES]
        self.data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        self.config.write_text(
            f"model_name_or_path: {self.model}\ntrain_dataset_path: {self.data}\nstage: SFT\nfine_tuning: Full\n"
            f"max_seq_len: 64\npacking: false\nbatch_size: 8\nmax_steps: {_STEPS}\nsave_steps: 1000\n"
            "learning_rate: 5e-3\nlr_scheduler_type: constant\nseed: 1\ntemperature: 0\nmax_new_tokens: 32\n",
            encoding="utf-8",
        )
        _erniekit("init", "--family", "micro-moe", "--train-tokenizer", self.data, "--out", self.model)
        return "a mixture of experts, random weights"

    def _train(self) -> str:
        _erniekit("train", self.config, f"output_dir={self.whole}")
        return _fallen(self.whole)

    def _stop(self) -> str:
        """Interrupt a second run in its first steps; it saves and says so with exit code 130."""
        log = self.stopped / "train_log.jsonl"
        with subprocess.Popen(
            _command("train", self.config, f"output_dir={self.stopped}"), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            begun = time.monotonic()
            while process.poll() is None and time.monotonic() - begun < _SECONDS:
                if log.is_file() and log.read_bytes().count(b"\n") >= _STOPPED_AFTER:
                    process.send_signal(signal.SIGINT)
                    break
                time.sleep(0.005)
            _, told = process.communicate(timeout=_SECONDS)
        if process.returncode != 130:
            raise CheckFailed(f"exit code {process.returncode} in place of 130\n{_last_lines(told)}")
        saved = [path.name for path in self.stopped.glob("checkpoint-*")]
        if not saved:
            raise CheckFailed("no checkpoint was saved")
        return f"saved {saved[0]}"

    def _resume(self) -> str:
        _erniekit("train", self.config, f"output_dir={self.stopped}")
        whole, resumed = (folder / "model.safetensors" for folder in (self.whole, self.stopped))
        if whole.read_bytes() != resumed.read_bytes():
            raise CheckFailed("the weights differ from those of the run that was not stopped")
        return "the weights of the run that was not stopped"

    def _export(self) -> str:
        _erniekit("export", self.config, f"output_dir={self.whole}")
        return ""

    def _verify(self) -> str:
        _erniekit("verify", self.whole / "export")
        return ""

    def _reload(self) -> str:
        import numpy as np
        import paddle

        from erniekit.checkpoint.load import load_model

        ids = paddle.to_tensor([[5, 9, 42, 300, 7]])
        trained, exported = (load_model(path)(ids).numpy() for path in (self.whole, self.whole / "export"))
        if not np.array_equal(trained, exported):
            raise CheckFailed(f"the logits differ by up to {np.abs(trained - exported).max():.2e}")
        return "bit-equal"

    def _chat(self) -> str:
        return _answers(self.whole / "export", *_SENTENCES[0])

    def _adapt(self) -> str:
        """Teach the trained model one more answer, its own weights frozen."""
        rows = self.adapter.with_suffix(".jsonl")
        rows.write_text(json.dumps({"src": [_NEWS[0]], "tgt": [_NEWS[1]]}) + "\n", encoding="utf-8")
        _erniekit("train", self.config, *self._adapter_keys(), f"train_dataset_path={rows}", "batch_size=1",
                  f"max_steps={_ADAPTER_STEPS}")  # fmt: skip
        return _fallen(self.adapter)

    def _merge(self) -> str:
        _erniekit("export", self.config, *self._adapter_keys())
        return _answers(self.adapter / "export", *_NEWS)

    def _adapter_keys(self) -> tuple[str, ...]:
        return "fine_tuning=LoRA", f"model_name_or_path={self.whole}", f"output_dir={self.adapter}"

    def _prefer(self) -> str:
        """Pairs whose rejected answer is that to the next question; the reference is the model where it began."""
        rows = self.preferred.with_suffix(".jsonl")
        wrong = [answer for _, answer in (*_SENTENCES[1:], _SENTENCES[0])]
        pairs = [
            {"question": question, "chosen": answer, "rejected": other}
            for (question, answer), other in zip(_SENTENCES, wrong, strict=True)
        ]
        rows.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
        _erniekit("train", self.config, "stage=DPO", f"model_name_or_path={self.model}", f"train_dataset_path={rows}",
                  f"output_dir={self.preferred}", f"max_steps={_PAIR_STEPS}")  # fmt: skip
        first = _losses(self.preferred)[0]
        if abs(first - math.log(2)) > 1e-4:
            raise CheckFailed(f"the loss begins at {first:.4f} in place of ln 2")
        return _fallen(self.preferred, share=0.8)


def _losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "train_log.jsonl").open(encoding="utf-8"))
    return [row["loss"] for row in rows if "loss" in row]


def _fallen(run: Path, *, share: float = 0.5) -> str:
    """The first and the last loss of a run, of which less than `share` must be left."""
    losses = _losses(run)
    if not losses[-1] < share * losses[0]:
        raise CheckFailed(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} only")
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"


def _answers(model: Path, question: str, answer: str) -> str:
    """What the model says to a question; it must be `answer`."""
    said = _erniekit("chat", model, "temperature=0", "max_new_tokens=32", lines=f"{question}\n")
    if said.strip() != answer:
        raise CheckFailed(f"asked {question!r}, it said {said.strip()!r} in place of {answer!r}")
    return f"{question} {answer}"


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "erniekit", *map(str, words)]


def _erniekit(*words: str | Path, lines: str = "") -> str:
    """Run a verb; returns what it printed."""
    try:
        done = subprocess.run(
            _command(*words), input=lines, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"`erniekit {words[0]}` was not done after {_SECONDS} s") from None
    if done.returncode:
        raise CheckFailed(f"`erniekit {words[0]}` ended with exit code {done.returncode}\n{_last_lines(done.stderr)}")
    return done.stdout


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-12:])
