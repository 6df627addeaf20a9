"""Prove that a checkpoint does not depend on who wrote it.

Trains a small mixture of experts a few steps under each of six layouts of CPU ranks and saves, in the midst of its
schedule; then goes on from each of these checkpoints under each of the layouts. The losses of the steps that follow are
compared with those of one process that was never stopped, and so are, after them, weights, moments and averages. How
far losses part when a checkpoint's moments are forgotten is measured, too: a proof must be able to fail.

    python scripts/prove_reshard.py [--only "tensor 2"] [--seed 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from erniekit.checkpoint.manifest import write_manifest  # noqa: E402

TOLERANCE = 1e-5
STATES = "training/optimizer.safetensors"
SAVED, STEPS = 3, 6
ROWS = 4  # of a micro-batch of all data ranks

CONFIG = """\
model_name_or_path: base
stage: SFT
fine_tuning: Full
compute_type: fp32
train_dataset_path: train.jsonl
max_seq_len: 128
packing: true
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
lr_scheduler_type: cosine
warmup_steps: 2
decay_steps: 8
weight_decay: 0.1
moe_aux_loss_lambda: 1.0e-3
ema_decay: 0.9
save_steps: 3
save_total_limit: 2
report_samples: 0
data_cache_dir: cache
"""
_TENSOR, _EXPERT = "tensor_parallel_degree=2", "expert_parallel_degree=2"
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {  # ranks, data ranks, keys
    "single": (1, 1, []),
    "tensor 2": (2, 1, [_TENSOR]),
    "expert 2": (2, 2, [_EXPERT, "use_expert_parallel=true"]),
    "stage1 2": (2, 2, ["sharding=stage1", "sharding_parallel_degree=2"]),
    "stage3 2": (2, 2, ["sharding=stage3", "sharding_parallel_degree=2"]),
    "tensor 2 x expert 2": (4, 2, [_TENSOR, _EXPERT, "use_expert_parallel=true"]),
}


def erniekit(folder: Path, *arguments: str) -> None:
    """Run the command line of this source tree; what it said is shown if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "erniekit", *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"erniekit {' '.join(arguments)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def prepare(folder: Path, *, seed: int) -> None:
    """Data, tokenizer, model and config."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(300)]

    def sentence() -> list[str]:
        return [" ".join(rng.choices(words, k=rng.randint(2, 12)))]

    rows = [{"src": sentence(), "tgt": sentence()} for _ in range(400)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.yaml").write_text(CONFIG, encoding="utf-8")
    erniekit(folder, "init", "--family", "micro-moe", "--train-tokenizer", "train.jsonl", "--out", "base")


def train(folder: Path, layout: str, out: str, *, steps: int) -> list[float]:
    """Train in `out` up to `steps`, going on from what is there; returns the loss of every step."""
    ranks, data_ranks, keys = LAYOUTS[layout]
    erniekit(
        folder, "train", "run.yaml", "--nproc", str(ranks), f"output_dir={out}", f"max_steps={steps}",
        f"batch_size={ROWS // data_ranks}", *keys,
    )  # fmt: skip
    rows = map(json.loads, (folder / out / "train_log.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def apart(found: Path, expected: Path) -> dict[str, float]:
    """How far the tensors of two checkpoints are apart, by their kind: of each the largest difference beside its
    largest number."""
    worst: dict[str, float] = {}
    for file in ("model.safetensors", STATES):
        mine, its = load_file(found / file), load_file(expected / file)
        assert mine.keys() == its.keys(), mine.keys() ^ its.keys()
        for name, array in its.items():
            kind = "weight" if file != STATES else name.rpartition(".")[2]
            difference = float(np.abs(mine[name] - array).max() / max(np.abs(array).max(), 1e-30))
            worst[kind] = max(worst.get(kind, 0.0), difference)
    return worst


def forget(checkpoint: Path, kind: str) -> None:
    """Leave a checkpoint that is whole, with zeros in place of one kind of state."""
    states = load_file(checkpoint / STATES)
    save_file({name: array * (not name.endswith(kind)) for name, array in states.items()}, checkpoint / STATES)
    write_manifest(checkpoint)


def prove(folder: Path, *, layouts: list[str], seed: int) -> dict[str, Any]:
    """Save under each layout, go on under each; returns the figures."""
    prepare(folder, seed=seed)
    begun, last = time.perf_counter(), f"checkpoint-{STEPS}"
    expected = train(folder, "single", "untouched", steps=STEPS)[SAVED:]

    def goes_on(saved: str, resumed: str, forgotten: str = "") -> tuple[float, dict[str, float]]:
        shutil.copytree(folder / saved, folder / "again")
        if forgotten:
            forget(folder / "again" / f"checkpoint-{SAVED}", forgotten)
        losses = train(folder, resumed, "again", steps=STEPS)[SAVED:]
        states = apart(folder / "again" / last, folder / "untouched" / last)
        shutil.rmtree(folder / "again")
        return max(abs(found - wanted) for found, wanted in zip(losses, expected, strict=True)), states

    pairs, states = {}, dict[str, float]()
    for saved in layouts:
        train(folder, saved, saved, steps=SAVED)
        for resumed in layouts:
            pair = f"{saved} -> {resumed}"
            pairs[pair], found = goes_on(saved, resumed)
            states = {kind: max(share, states.get(kind, 0.0)) for kind, share in found.items()}
            print(f"{pair}: {pairs[pair]:.2g}", file=sys.stderr, flush=True)
    return {
        "layouts": layouts, "steps_saved_after": SAVED, "losses_compared": STEPS - SAVED, "expected": expected,
        "difference": pairs, "largest": max(pairs.values()), "tolerance": TOLERANCE, "seed": seed,
        "states_apart_after": states,
        "forgotten": {kind: goes_on(layouts[0], layouts[0], kind)[0] for kind in ("moment1", "moment2")},
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def main() -> None:
    """Prove, print the figures as JSON, exit with 1 if a loss is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=tuple(LAYOUTS), help="these layouts (again for more)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = prove(Path(folder), layouts=options.only or list(LAYOUTS), seed=options.seed)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(not figures["largest"] <= TOLERANCE < min(figures["forgotten"].values()))


if __name__ == "__main__":
    main()
