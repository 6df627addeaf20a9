"""How much faster pairs train when their two answers share the computation of their prompt.

Trains adapters on the real pairs of scripts/prove_align.py with `share_prompt` on and off, alternating, each run in a
process of its own. What counts is trained tokens per second: a pair's answers have as many of them either way, whatever
is computed for their prompt.

    python scripts/bench_pairs.py [--out FILE] [--rounds 3] [--steps 12] [--model DIR] [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_train import commit, machine, spread
from prove_align import CASES, fetched, split, train, write_config
from prove_resume import ROOT

WARM_UP_STEPS = 2


def run(folder: Path, *, share: bool, steps: int, **config: Any) -> dict[str, float]:
    """Seconds, tokens in the rows, and trained tokens of the steps after the first ones."""
    more = {"max_steps": steps + WARM_UP_STEPS, "share_prompt": share, "evaluation_strategy": "no", "max_seq_len": 3072}
    write_config(folder, CASES["dpo_lora"], more=more, **config)
    train(folder)
    rows = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]
    counted = [row for row in rows if "tokens_per_s" in row][WARM_UP_STEPS:]
    seconds = sum(row["tokens"] / row["tokens_per_s"] for row in counted)
    return {name: sum(row[name] for row in counted) for name in ("tokens", "trained_tokens")} | {"seconds": seconds}


def main() -> None:
    """Measure, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", type=Path, default=ROOT / "output" / "quickstart" / "sft")
    parser.add_argument("--data", type=Path, help="a folder with the archive's data, in place of fetching it")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    data = options.data or fetched()
    from erniekit.data.tokenizer import Tokenizer

    found: dict[str, list[dict[str, float]]] = {"shared": [], "apart": []}
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place, "data")
        rows.mkdir()
        split(data, rows, tokenizer=Tokenizer.from_folder(options.model), seed=1)
        for number in range(options.rounds):
            for name, share in (("shared", True), ("apart", False)):
                found[name].append(run(
                    Path(place, f"{name}-{number}"), share=share, steps=options.steps, data=rows,
                    model=options.model.resolve(), seed=1,
                ))  # fmt: skip
    rates = {name: [each["trained_tokens"] / each["seconds"] for each in rounds] for name, rounds in found.items()}
    gains = [shared / apart for shared, apart in zip(rates["shared"], rates["apart"], strict=True)]
    per_answer = {name: rounds[0]["tokens"] / rounds[0]["trained_tokens"] for name, rounds in found.items()}
    result = {
        "commit": commit(), "machine": machine(), "rounds": found,
        "trained_tokens_per_s": {name: spread(values, digits=0) for name, values in rates.items()},
        "tokens_computed_for_a_trained_one": {name: round(value, 2) for name, value in per_answer.items()},
        "gain": spread(gains, digits=2),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
