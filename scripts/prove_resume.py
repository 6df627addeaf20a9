"""Prove that a run killed anywhere ends bit-equal to one that was never touched.

Trains a small mixture of experts once without interruption; then once more, killed with SIGKILL at random moments
(start-up, steps and saves) and started again with the same command each time. Compared: the final weights, the
optimizer's state and the reference's copy in the last checkpoint, and every row of train_log.jsonl that either run ever
wrote, rows of lives that were killed before a save included (a row's loss depends on the step's samples: equal losses
mean equal order).

    python scripts/prove_resume.py [--stage DPO] [--lora] [--kills 20] [--steps 300] [--seed 1] [--json FILE]

`--stage` is SFT (the default), DPO, KTO or RM; `--lora` trains adapters. With DPO the reference follows the policy
every 7 steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = {"tokens_per_s"}  # a clock's figure, the only one in a row
START_KILLS = 0.2  # share of kills that come before the first step
SAVE_EVERY = 2

CONFIG = """\
model_name_or_path: ../base
output_dir: run
stage: {stage}
fine_tuning: {fine_tuning}
compute_type: fp32
train_dataset_path: ../train.jsonl
eval_dataset_path: ../train.jsonl
max_evaluate_steps: 1
max_seq_len: 128
packing: true
max_steps: {steps}
batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
lr_scheduler_type: cosine
warmup_steps: 10
weight_decay: 0.1
moe_use_aux_free: true
moe_aux_loss_lambda: 1.0e-3
moe_orthogonal_loss_lambda: 1.0e-3
evaluation_strategy: steps
eval_steps: 25
load_best_model_at_end: true
ema_decay: 0.99
save_steps: {save_every}
save_total_limit: 3
data_cache_dir: cache
"""
OF_STAGE = {
    "SFT": "",
    "DPO": "ref_model_update_steps: 7\nattention_probs_dropout_prob: 0.1\ndropout_warmup_steps: 10\n",
    "KTO": "",
    "RM": "",
}
LORA = "lora_rank: 4\n"


def erniekit(*arguments: str) -> list[str]:
    """The command line of this source tree."""
    return [sys.executable, "-m", "erniekit", *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with the source tree importable from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def training_rows(stage: str, sentences: Callable[[int], list[str]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """What a stage trains on: dialogues, or a prompt with a better and a worse answer."""
    for turns in rng.choices((1, 2, 3), k=400):
        if stage == "SFT":
            yield {"src": sentences(turns), "tgt": sentences(turns)}
        else:
            question, chosen, rejected = sentences(3)
            yield {"question": question, "chosen": chosen, "rejected": rejected}


def prepare(folder: Path, *, stage: str, lora: bool, steps: int, seed: int) -> None:
    """Data, tokenizer, model, and the two places to train in; the config is the same, so both write the same files."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(300)]

    def sentences(count: int) -> list[str]:
        return [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(count)]

    rows = training_rows(stage, sentences, rng)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = erniekit("init", "--family", "micro-moe", "--train-tokenizer", "train.jsonl", "--out", "base")
    subprocess.run(command, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
    for name in ("untouched", "killed"):
        (folder / name).mkdir()
        config = CONFIG.format(
            steps=steps, save_every=SAVE_EVERY, stage=stage, fine_tuning="LoRA" if lora else "Full"
        )  # fmt: skip
        config += OF_STAGE[stage] + (LORA if lora else "")
        (folder / name / "run.yaml").write_text(config, encoding="utf-8")


class Life:
    """One start of the training command, with its output in a file."""

    words: tuple[str, ...] = ("train", "run.yaml")

    def __init__(self, folder: Path, *, number: int) -> None:
        self._output = folder / f"output-{number}.txt"
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                erniekit(*self.words), cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def step(self) -> int:
        """The last step that was printed; 0 before the first."""
        steps = re.findall(r"^step (\d+)/", self.output, re.MULTILINE)
        return int(steps[-1]) if steps else 0

    @property
    def output(self) -> str:
        """Everything that was printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, step: int) -> None:
        """Return once `step` was printed, or the process has ended."""
        while self.step < step and self.process.poll() is None:
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to the process and anything it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        """Let it run to its end; what it said is shown if it failed."""
        if self.process.wait():
            sys.exit(f"erniekit train ended with {self.process.returncode}:\n{self.output[-4000:]}")


def log_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of train_log.jsonl; a last line that was cut by a kill is left out."""
    path = folder / "run" / "train_log.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append({key: value for key, value in row.items() if key not in NOT_COMPARED})
    return rows


def digests(folder: Path, *, steps: int) -> dict[str, str]:
    """sha256 of the files of tensors: final model, averages and, in the last checkpoint, model and optimizer."""
    places = (folder / "run", folder / "run" / "ema")
    files = [path for place in places for path in place.glob("*.safetensors")]
    files += (folder / f"run/checkpoint-{steps}").rglob("*.safetensors")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def killed_run(folder: Path, *, kills: int, steps: int, timing: dict[str, float], rng: random.Random) -> dict[str, Any]:
    """Train with `kills` random kills; returns the kill points and every row that was ever logged."""
    points: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    saved = 0
    for number in range(kills):
        life = Life(folder, number=number)
        if rng.random() < START_KILLS:
            time.sleep(rng.uniform(0, timing["start"]))
        else:
            # at most 3/4 of the way even before the last kill, so that no life reaches the end
            share = (steps - saved) / (kills - number + 1)
            life.wait_for(saved + 1 + rng.randint(0, int(1.5 * share)))
            time.sleep(rng.uniform(0, 2 * timing["step"]))
        if life.process.poll() is not None:
            sys.exit(f"life {number} ended by itself at step {life.step}, before its kill:\n{life.output[-2000:]}")
        life.kill()
        run = folder / "run"
        saving = bool(list(run.glob(".checkpoint-*"))) if run.is_dir() else False
        points.append({"step": life.step, "in_a_save": saving})
        rows += log_rows(folder)
        saved = max((int(p.name.rpartition("-")[2]) for p in run.glob("checkpoint-*")), default=0)
    last = Life(folder, number=kills)
    last.finish()
    return {"points": points, "rows": rows + log_rows(folder), "last_output": last.output}


def prove(folder: Path, *, stage: str, lora: bool, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Run both and compare; returns the figures."""
    prepare(folder, stage=stage, lora=lora, steps=steps, seed=seed)
    begun = time.perf_counter()
    untouched = Life(folder / "untouched", number=0)
    untouched.wait_for(1)
    stepping = time.perf_counter()
    untouched.finish()
    ended = time.perf_counter()
    timing = {"start": stepping - begun, "step": (ended - stepping) / steps}

    killed = killed_run(folder / "killed", kills=kills, steps=steps, timing=timing, rng=random.Random(seed))
    expected = log_rows(folder / "untouched")
    wanted, got = (digests(folder / name, steps=steps) for name in ("untouched", "killed"))
    by_step = {(row["step"], "eval_loss" in row): row for row in expected}
    different = [row for row in killed["rows"] if by_step[row["step"], "eval_loss" in row] != row]
    return {
        "stage": stage,
        "lora": lora,
        "kills": kills,
        "kills_before_the_first_step": sum(point["step"] == 0 for point in killed["points"]),
        "kills_in_a_save": sum(point["in_a_save"] for point in killed["points"]),
        "steps": steps,
        "save_every": SAVE_EVERY,
        "seed": seed,
        "rows_compared": len(killed["rows"]),
        "rows_different": len(different),
        "log_equal": log_rows(folder / "killed") == expected,
        "files_compared": sorted(wanted),
        "files_different": sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)),
        "optimizer_compared": any("optimizer" in name for name in wanted),
        "seconds": round(time.perf_counter() - begun, 1),
        "kill_points": [point["step"] for point in killed["points"]],
    }


def main() -> None:
    """Prove, print the figures as JSON, exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(OF_STAGE), default="SFT")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = prove(
            Path(folder), stage=options.stage, lora=options.lora, kills=options.kills, steps=options.steps,
            seed=options.seed,
        )  # fmt: skip
    figures["equal"] = (
        figures["log_equal"] and figures["optimizer_compared"]
        and not figures["rows_different"] and not figures["files_different"]
    )  # fmt: skip
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(not figures["equal"])


if __name__ == "__main__":
    main()
