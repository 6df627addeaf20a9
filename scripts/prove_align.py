"""Prove that adapters and preference training learn, on real data, and go on bit-equal after a kill.

The base is the model that the quickstart trains (10 million parameters, English and Chinese chat); make it first:
`bash scripts/quickstart.sh`. The data comes from the source archive of llamafactory 0.9.5, which pip fetches from its
configured index into the cache folder: 600 comparisons of two answers, 300 judged answers and 2,000 instructions,
English and Chinese. What is too long for a row is left out; 30 % are held out, drawn by the seed.

    python scripts/prove_align.py [--out FILE] [--only dpo kto ...] [--seeds 3] [--model DIR] [--data DIR]

Told of each run: the loss in its first and last fifth, the held-out figures, and of accuracies the number of held-out
samples and the standard error. A model that cannot tell good from bad has the loss ln 2 (DPO, RM) or 1/2 (KTO) and the
accuracy 1/2; the policy of DPO and KTO begins there, at its reference. Two yardsticks for the pairs: choosing the
longer answer, a logistic regression on counts of tokens.

The run is then cut short, killed in the middle and started again, and its files compared with an untouched one's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_train import commit, machine
from prove_resume import ROOT, Life, digests, environment, erniekit, log_rows

PACKAGE = "llamafactory==0.9.5"
ARCHIVE = "llamafactory-0.9.5.tar.gz"
DIGEST = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
SIDES = ("train", "eval")
SOURCES = {  # of ours -> in the archive
    "pairs": ("dpo_en_demo.json", "dpo_zh_demo.json"), "judged": ("kto_en_demo.json",),
    "instructions": ("alpaca_en_demo.json", "alpaca_zh_demo.json"),
}  # fmt: skip
ROW, HELD_OUT, SPARE = 1536, 0.3, 100  # tokens of a row; share; tokens that a template may add
RESUME_STEPS, KILL_AT = 6, 3

COMMON: dict[str, Any] = {
    "output_dir": "run", "compute_type": "fp32", "mix_strategy": "concat", "packing": True, "max_seq_len": ROW,
    "max_prompt_len": 1024, "num_train_epochs": 1, "batch_size": 2, "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "weight_decay": 0.0, "evaluation_strategy": "epoch",
    "save_strategy": "no", "report_samples": 0, "check_leaks": False, "moe_health_steps": 0,
}  # fmt: skip
BLIND = {"DPO": math.log(2), "KTO": 0.5, "RM": math.log(2)}  # the loss where nothing is told apart
LORA: dict[str, Any] = {"fine_tuning": "LoRA", "lora_rank": 16}
WORDS = {"modules_to_save": ["model.embed_tokens"]}  # so small a model tells answers apart by their words


@dataclass(frozen=True)
class Case:
    """A run: what it learns from, and its keys beside the common ones."""

    sources: tuple[str, ...]
    keys: dict[str, Any]
    every_seed: bool = False

    @property
    def stage(self) -> str:
        """Its stage."""
        return self.keys["stage"]


CASES = {
    "sft_lora": Case(("instructions",), {"stage": "SFT", **LORA, "learning_rate": 2e-3}),
    "sft_wint48_lora": Case(
        ("instructions",), {"stage": "SFT", **LORA, "compute_type": "wint4/8", "learning_rate": 2e-3}
    ),
    "dpo": Case(
        ("pairs",), {"stage": "DPO", "fine_tuning": "Full", "beta": 0.01, "learning_rate": 1e-4}, every_seed=True
    ),
    "dpo_lora": Case(
        ("pairs",), {"stage": "DPO", **LORA, **WORDS, "beta": 0.01, "learning_rate": 1e-3}, every_seed=True
    ),
    "kto": Case(("judged", "pairs"), {"stage": "KTO", "fine_tuning": "Full", "learning_rate": 1e-5}),
    "rm": Case(("pairs",), {"stage": "RM", "fine_tuning": "Full", "learning_rate": 1e-4}),
}


# ---------------------------------------------------------------------- data
def fetched() -> Path:
    """The archive's folder of data, unpacked in the cache folder."""
    from erniekit.base import runtime

    cache = Path(runtime.cache_folder()) / "llamafactory-0.9.5"
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "--dest", folder, PACKAGE], check=True)
            archive = Path(folder, ARCHIVE)
            if hashlib.sha256(archive.read_bytes()).hexdigest() != DIGEST:
                sys.exit(f"{ARCHIVE} from pip's index is not the file that these figures are about")
            with tarfile.open(archive) as file:
                wanted = {f"llamafactory-0.9.5/data/{name}" for names in SOURCES.values() for name in names}
                file.extractall(folder, [member for member in file if member.name in wanted], filter="data")
            Path(folder, "llamafactory-0.9.5", "data").rename(cache)
    return cache


def texts(row: dict[str, Any]) -> list[str]:
    """All that is said in a row."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    if "conversations" in row:
        return [message["value"] for message in (*row["conversations"], row["chosen"], row["rejected"])]
    return [row["instruction"], row["input"], row["output"]]


def split(data: Path, out: Path, *, tokenizer: Any, seed: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Write `out`/SOURCE-SIDE.jsonl; returns the rows by source and side."""
    made: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for source, names in SOURCES.items():
        sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for name in names:
            rows = json.loads((data / name).read_text(encoding="utf-8"))
            fitting = [row for row in rows if len(tokenizer.encode("".join(texts(row)))) <= ROW - SPARE]
            random.Random(seed).shuffle(fitting)
            held = round(HELD_OUT * len(fitting))
            sides["eval"] += fitting[:held]
            sides["train"] += fitting[held:]
        for side, rows in sides.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / f"{source}-{side}.jsonl").write_text(lines, encoding="utf-8")
        made[source] = sides
    return made


def yardsticks(pairs: dict[str, list[dict[str, Any]]], *, tokenizer: Any) -> dict[str, float]:
    """Held-out accuracy of choosing the longer answer, and of a logistic regression on counts of tokens."""
    size = tokenizer.max_id + 1

    def counts(row: dict[str, Any], answer: str) -> np.ndarray:
        return np.log1p(np.bincount(tokenizer.encode(row[answer]["value"]), minlength=size)[:size])

    sides = {side: np.stack([counts(row, "chosen") - counts(row, "rejected") for row in pairs[side]]) for side in SIDES}
    weights = np.zeros(size)
    for _ in range(300):
        wrong = 1 / (1 + np.exp(sides["train"] @ weights))
        weights += 0.1 * (sides["train"].T @ wrong / len(wrong) - 0.1 * weights)
    longer = [len(row["chosen"]["value"]) > len(row["rejected"]["value"]) for row in pairs["eval"]]
    return {"longer": statistics.mean(longer), "regression": float((sides["eval"] @ weights > 0).mean())}


# ---------------------------------------------------------------------- runs
def write_config(folder: Path, case: Case, *, data: Path, model: Path, seed: int, more: dict[str, Any]) -> None:
    """`folder`/run.yaml; JSON is YAML."""
    paths = {f"{side}_dataset_path": [str(data / f"{name}-{side}.jsonl") for name in case.sources] for side in SIDES}
    keys = COMMON | case.keys | paths | {"model_name_or_path": str(model), "seed": seed} | more
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(json.dumps(keys, indent=1), encoding="utf-8")


def train(folder: Path) -> float:
    """Run it to its end; returns the seconds."""
    started = time.perf_counter()
    Life(folder, number=0).finish()
    return time.perf_counter() - started


def eval_loss(folder: Path) -> float:
    """What `erniekit eval` says of the base on the run's held-out rows."""
    done = subprocess.run(
        erniekit("eval", "run.yaml"), cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    found = re.search(r"loss\D*([\d.]+\d)", done.stdout)
    if done.returncode or not found:
        sys.exit(f"erniekit eval ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return float(found[1])


def figures(folder: Path) -> dict[str, Any]:
    """The loss in the first and the last fifth of a run, its last held-out figures, and its curve."""
    rows = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    fifth = max(len(steps) // 5, 1)
    held = next(row for row in reversed(rows) if "eval_loss" in row)
    return {
        "steps": len(steps),
        "loss_first_fifth": statistics.mean(row["loss"] for row in steps[:fifth]),
        "loss_last_fifth": statistics.mean(row["loss"] for row in steps[-fifth:]),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in steps),
        "held_out": {name: value for name, value in held.items() if name.startswith("eval_")},
        "curve": [round(row["loss"], 5) for row in steps],
    }


def killed_equals_untouched(folder: Path, **config: Any) -> bool:
    """Whether a short run that was killed with SIGKILL ends with the files and the log of one that was not."""
    short = {"max_steps": RESUME_STEPS, "save_strategy": "steps", "save_steps": 2, "evaluation_strategy": "no"}
    for name in ("untouched", "killed"):
        write_config(folder / name, **config, more=short)
    train(folder / "untouched")
    life = Life(folder / "killed", number=1)
    life.wait_for(KILL_AT)
    if life.process.poll() is not None:
        sys.exit(f"the run ended before its kill:\n{life.output[-2000:]}")
    life.kill()
    train(folder / "killed")
    ends = [(digests(folder / name, steps=RESUME_STEPS), log_rows(folder / name)) for name in ("untouched", "killed")]
    return ends[0] == ends[1] and any("optimizer" in name for name in ends[0][0])


def prove(case: Case, folder: Path, *, seeds: list[int], model: Path, more: dict[str, Any]) -> dict[str, Any]:
    """All runs of a case; accuracies are over the held-out samples of all seeds."""
    runs = []
    for seed in seeds if case.every_seed else seeds[:1]:
        place = folder / f"seed-{seed}"
        write_config(place, case, data=folder.parent / f"data-{seed}", model=model, seed=seed, more=more)
        before = eval_loss(place) if case.stage == "SFT" else BLIND[case.stage]
        seconds = train(place)
        runs.append({"seed": seed, "held_out_loss_before": before, "seconds": round(seconds, 1)} | figures(place))
    found: dict[str, Any] = {"keys": case.keys, "runs": runs}
    if case.stage != "SFT":
        counts = [run["held_out"]["eval_samples"] for run in runs]
        right = sum(run["held_out"]["eval_accuracy"] * count for run, count in zip(runs, counts, strict=True))
        share = right / sum(counts)
        found |= {"held_out_accuracy_before": 0.5, "held_out_accuracy": share, "held_out_samples": sum(counts)}
        found["standard_error"] = math.sqrt(share * (1 - share) / sum(counts))
    found["learns"] = all(run["held_out"]["eval_loss"] < run["held_out_loss_before"] for run in runs) and (
        case.stage == "SFT" or found["held_out_accuracy"] > 0.5
    )
    found["resumes_bit_equal"] = killed_equals_untouched(
        folder / "resume", case=case, data=folder.parent / f"data-{seeds[0]}", model=model, seed=seeds[0]
    )
    return found


def main() -> None:
    """Prove, print the figures as JSON, exit with 1 if a run does not learn or does not resume bit-equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seeds", type=int, default=3, help="of the cases dpo and dpo_lora")
    parser.add_argument("--model", type=Path, default=ROOT / "output" / "quickstart" / "sft")
    parser.add_argument("--data", type=Path, help="a folder with the archive's data, in place of fetching it")
    parser.add_argument("--max-steps", type=int, default=-1, help="of every run: a short one proves less")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        sys.exit(f"{options.model}: no model there. bash scripts/quickstart.sh makes it, or name one with --model.")
    sys.path.insert(0, str(ROOT))
    data, seeds = options.data or fetched(), list(range(1, options.seeds + 1))
    from erniekit.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(options.model)
    result: dict[str, Any] = {"commit": commit(), "machine": machine(), "archive": DIGEST, "row": ROW, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            (place := Path(folder, f"data-{seed}")).mkdir()
            rows = split(data, place, tokenizer=tokenizer, seed=seed)
            counted = {source: {side: len(rows[source][side]) for side in SIDES} for source in rows}
            result[f"seed {seed}"] = {"rows": counted, **yardsticks(rows["pairs"], tokenizer=tokenizer)}
        for name in options.only:
            more = {"max_steps": options.max_steps}
            result["cases"][name] = prove(
                CASES[name], Path(folder, name), seeds=seeds, model=options.model.resolve(), more=more
            )
            print(f"{name}: {json.dumps(result['cases'][name] | {'runs': None})}", file=sys.stderr, flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(not all(case["learns"] and case["resumes_bit_equal"] for case in result["cases"].values()))


if __name__ == "__main__":
    main()
