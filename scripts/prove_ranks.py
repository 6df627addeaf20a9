"""Prove that several ranks train as one process does, and that a run outlives the death of any of its ranks.

Losses: the quickstart's config (scripts/quickstart.sh makes its data and model) on two ranks, once with the experts
shared and once with every matrix shared, and on four with both, beside one process with as many rows a step. Sums are
in another order, so losses part slowly: within 1e-5 for 5 steps and 2e-4 for 12; the largest difference over all steps
is told.

Deaths: a small mixture of experts on two ranks, one of which is killed with SIGKILL at a random moment, again and again
and the same command is started each time. Compared with a run that was never touched, bit for bit: the final weights,
the optimizer's state and every row of the log. How long the job takes to end after each death is measured, too.

    python scripts/prove_ranks.py [--steps 50] [--layouts NAME ...] [--kills 10] [--seed 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import prove_resume
from prove_resume import ROOT, digests, environment, erniekit, log_rows

CONFIG = "examples/configs/ERNIE-4.5-tiny/sft/run_sft.yaml"
NEAR = {5: 1e-5, 12: 2e-4}  # steps: how far apart their losses may be
LAYOUTS = {  # ranks, their keys, the rows of one process beside them (2 for each data rank), and at most how many steps
    "expert_parallel_degree": (2, ["expert_parallel_degree=2"], 4, 50),
    "tensor_parallel_degree": (2, ["tensor_parallel_degree=2"], 2, 50),
    "both": (4, ["tensor_parallel_degree=2", "expert_parallel_degree=2"], 4, 12),
}
OF_RANKS = ["--nproc", "2", "expert_parallel_degree=2"]
SECONDS = 10  # in which a job ends after the death of a rank


# ---------------------------------------------------------------------- losses
def losses(folder: Path, *words: str, steps: int) -> list[float]:
    """The losses of so many steps of the quickstart's config."""
    fixed = [f"max_steps={steps}", "save_strategy=no", "evaluation_strategy=no", "report_samples=0"]
    command = erniekit("train", CONFIG, f"output_dir={folder}", *fixed, *words)
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def compared(folder: Path, *, names: list[str], steps: int) -> dict[str, Any]:
    """For each layout the largest difference over the first steps, and over all."""
    found = {}
    for name in names:
        num_ranks, keys, rows, most = LAYOUTS[name]
        taken = min(steps, most)
        alone = losses(folder / f"{name}-alone", f"batch_size={rows}", steps=taken)
        ranks = losses(folder / f"{name}-ranks", *keys, "--nproc", str(num_ranks), steps=taken)
        apart = [abs(mine - its) for mine, its in zip(ranks, alone, strict=True)]
        found[name] = {str(until): max(apart[:until]) for until in sorted({*NEAR, taken})}
    return found


# ---------------------------------------------------------------------- deaths
def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class Life(prove_resume.Life):
    """One start of the command on several ranks."""

    words = ("train", "run.yaml", *OF_RANKS)

    def kill_rank(self, rng: random.Random) -> float:
        """SIGKILL to one of the ranks; how long it takes until the job has ended."""
        killed_at, victim = time.monotonic(), rng.choice(children(self.process.pid))
        os.kill(victim, signal.SIGKILL)
        try:
            code = self.process.wait(timeout=6 * SECONDS)
        except subprocess.TimeoutExpired:
            sys.exit(f"a minute after the death of a rank the job still runs:\n{self.output[-2000:]}")
        if code == 0 or not re.search(r"rank \d+", self.output):
            sys.exit(f"the job ended with {code} and does not name the rank that died:\n{self.output[-2000:]}")
        return time.monotonic() - killed_at


def killed_run(folder: Path, *, kills: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """Train with `kills` deaths of a rank; what was logged, and how long jobs took to end."""
    rows, points, seconds = [], [], []
    saved = 0
    for number in range(kills):
        life = Life(folder, number=number)
        share = (steps - saved) / (kills - number + 1)
        life.wait_for(saved + 1 + rng.randint(0, int(1.5 * share)))
        time.sleep(rng.uniform(0, 0.2))
        if life.process.poll() is not None:
            sys.exit(f"life {number} ended by itself, before its kill:\n{life.output[-2000:]}")
        seconds.append(life.kill_rank(rng))
        points.append(life.step)
        rows += log_rows(folder)
        saved = max((int(p.name.rpartition("-")[2]) for p in (folder / "run").glob("checkpoint-*")), default=0)
    Life(folder, number=kills).finish()
    return {"rows": rows + log_rows(folder), "points": points, "seconds": seconds}


def outlived(folder: Path, *, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Run untouched and killed, and compare."""
    prove_resume.prepare(folder, stage="SFT", lora=False, steps=steps, seed=seed)
    Life(folder / "untouched", number=0).finish()
    killed = killed_run(folder / "killed", kills=kills, steps=steps, rng=random.Random(seed))
    by_step = {(row["step"], "eval_loss" in row): row for row in log_rows(folder / "untouched")}
    wanted, got = (digests(folder / name, steps=steps) for name in ("untouched", "killed"))
    return {
        "kills": kills,
        "steps": steps,
        "kill_points": killed["points"],
        "seconds_to_end": [round(each, 1) for each in killed["seconds"]],
        "rows_compared": len(killed["rows"]),
        "rows_different": sum(by_step[row["step"], "eval_loss" in row] != row for row in killed["rows"]),
        "files_compared": sorted(wanted),
        "files_different": sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)),
    }


def main() -> None:
    """Prove, print the figures as JSON, exit with 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of the runs whose losses are compared (0: none)")
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kill-steps", type=int, default=60, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.steps and not (ROOT / "output/quickstart/base").is_dir():
        sys.exit("output/quickstart is not there: run scripts/quickstart.sh first, or give --steps 0.")
    figures: dict[str, Any] = {}
    good = True
    with tempfile.TemporaryDirectory() as folder:
        if options.steps:
            figures["losses"] = compared(Path(folder), names=options.layouts, steps=options.steps)
            good = all(apart[str(n)] <= most for apart in figures["losses"].values() for n, most in NEAR.items())
        if options.kills:
            deaths = outlived(Path(folder), kills=options.kills, steps=options.kill_steps, seed=options.seed)
            figures["deaths"] = deaths
            good = good and not deaths["rows_different"] and not deaths["files_different"]
            good = good and max(deaths["seconds_to_end"]) <= SECONDS
    figures["good"] = good
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(not good)


if __name__ == "__main__":
    main()
