"""Prove that training in FP8 learns as training in fp32 does: the quickstart's mixture of experts, by emulation.

The same steps on the same rows in the same order, once for each number format: fp32, bf16 products (where the processor
has them: the yardstick of what any rounding does), FP8 blockwise and FP8 quantisation-aware. Model, data and settings
are the quickstart's (10 million parameters; hidden 256, experts 256 wide, so every block of 128 is full); make them
first: `bash scripts/quickstart.sh`. A run that was cut goes on where it was.

    python scripts/prove_fp8.py [--steps 300] [--only blockwise ...] [--work DIR] [--quickstart DIR] [--out FILE]

Told of each: the held-out loss at the end, the mean of the last 50 training losses, both beside fp32 in per cent (below
0.5 is wanted), and the median of seconds per step. The curves go to the JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_train import commit, machine
from prove_resume import ROOT, environment, erniekit

CONFIG = ROOT / "examples" / "configs" / "ERNIE-4.5-tiny" / "sft" / "run_sft.yaml"
FP8 = ("compute_type=fp8", "fp8_emulate=true")
FORMATS = {
    "fp32": ("compute_type=fp32",),
    "bf16": ("compute_type=bf16", "cpu_bf16_matmul=true"),
    "blockwise": (*FP8, "fp8_recipe=blockwise"),
    "qat": (*FP8, "fp8_recipe=qat"),
}
LAST = 50  # training losses that are averaged
WANTED = 0.5  # per cent


def train(name: str, *, work: Path, quickstart: Path, steps: int) -> Path:
    """Train one of FORMATS, or go on with it, or leave it if it is finished; returns its folder."""
    folder = work / name
    keys = {
        "model_name_or_path": quickstart / "base", "train_dataset_path": quickstart / "data" / "train.jsonl",
        "eval_dataset_path": quickstart / "data" / "eval.jsonl", "output_dir": folder, "max_steps": steps,
        "eval_steps": max(steps // 6, 1), "save_steps": max(steps // 15, 1), "logging_steps": max(steps // 15, 1),
        "report_samples": 0, "disable_tqdm": "true", "moe_health_steps": 0,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in keys.items()]
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{name}.txt").open("a", encoding="utf-8") as file:
        done = subprocess.run(
            erniekit("train", str(CONFIG), *words, *FORMATS[name]), env=environment(), stdout=file,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}; what it said is in {file.name}")
    return folder


def figures(folder: Path) -> dict[str, Any]:
    """What a finished run's log says."""
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    taken = [row for row in rows if "tokens_per_s" in row and "loss" in row]
    measured = [row for row in rows if "eval_loss" in row]
    seen = [row for row in taken if "fp8_amax" in row]
    fp8 = {name: max(row[name] for row in seen) for name in ("fp8_amax", "fp8_underflow", "fp8_overflow") if seen}
    return {
        "steps": len(taken),
        "eval_loss": measured[-1]["eval_loss"],
        "last_losses": statistics.fmean(row["loss"] for row in taken[-LAST:]),
        "seconds_per_step": statistics.median(row["tokens"] / row["tokens_per_s"] for row in taken),
        **fp8,
        "curve": [round(row["loss"], 6) for row in taken],
        "eval_curve": {row["step"]: round(row["eval_loss"], 6) for row in measured},
    }


def gaps(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """How far a run is from fp32, in per cent; above 0 is worse."""
    return {name: 100 * (found[name] / exact[name] - 1) for name in ("eval_loss", "last_losses")}


def table(formats: dict[str, dict[str, Any]]) -> str:
    """For people, in Markdown."""
    lines = [
        f"| format | held-out loss | gap | mean of the last {LAST} losses | gap | seconds per step |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in formats.items():
        gap = found.get("gaps", {"eval_loss": 0.0, "last_losses": 0.0})
        lines.append(
            f"| {name} | {found['eval_loss']:.4f} | {gap['eval_loss']:+.2f} % | {found['last_losses']:.4f} | "
            f"{gap['last_losses']:+.2f} % | {found['seconds_per_step']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Train, compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), help="beside fp32")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "prove_fp8")
    parser.add_argument("--quickstart", type=Path, default=ROOT / "output" / "quickstart")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not (options.quickstart / "base").is_dir():
        sys.exit(f"{options.quickstart} holds no model: bash scripts/quickstart.sh makes it")
    formats: dict[str, dict[str, Any]] = {}
    for name in ("fp32", *(name for name in FORMATS if name in options.only and name != "fp32")):
        folder = train(name, work=options.work.resolve(), quickstart=options.quickstart.resolve(), steps=options.steps)
        formats[name] = figures(folder)
        if name != "fp32":
            formats[name]["gaps"] = gaps(formats[name], formats["fp32"])
    report = {
        "what": "training in FP8 by emulation, beside fp32", "commit": commit(), "machine": machine(),
        "when": time.strftime("%Y-%m-%d"), "wanted_percent": WANTED, "formats": formats,
    }  # fmt: skip
    print(table(formats))
    out = options.out or options.work / "prove_fp8.json"
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")
    far = [
        f"{name}: {gap}"
        for name, found in formats.items()
        for gap, value in found.get("gaps", {}).items()
        if name in ("blockwise", "qat") and value > WANTED
    ]
    if far:
        print(f"further from fp32 than {WANTED} %: {', '.join(far)}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
