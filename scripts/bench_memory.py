"""Measured peak memory of training beside the budget (erniekit/training/budget.py), and the budget of large models.

    python scripts/bench_memory.py [--out FILE] [--only full lora ...] [--rounds 3] [--small]

Every case is a run of `erniekit train` (or a load of a quantised model) in a process of its own on a random mixture of
experts, with a malloc that gives freed memory back at once. Two figures stand beside the budget: the peak of Paddle's
own account of tensors, and what the process held above its size before the model was built; the second one has to hold
what kernels take, too. Without that malloc the process holds more, because freed memory is kept for the next step.

For the released models on 80 GB cards the same formula is printed for one of as many cards as are published as the
least, under a layout that can be run here (there is no pipeline yet): bf16, fp32 masters and moments, whole layers
recomputed, one row at a time on every card that has rows of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_train import commit, machine
from prove_resume import ROOT, environment, erniekit

TIDY = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
SIZES = {
    "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "moe_num_experts": 16, "moe_intermediate_size": 512,
    "num_hidden_layers": 6, "moe_layer_end_index": 5,
}  # fmt: skip
SMALL = {"num_hidden_layers": 4, "moe_layer_end_index": 3}
LARGE = {  # for loads: what the interpreter and its libraries take at first use, 15 MB, is little beside it
    "hidden_size": 1024, "intermediate_size": 4096, "moe_num_experts": 32, "moe_intermediate_size": 768,
    "num_hidden_layers": 5, "moe_layer_end_index": 4,
}  # fmt: skip
MODELS = {"base": SIZES, "small": SIZES | SMALL, "large": SIZES | LARGE}
LORA = {"fine_tuning": "LoRA", "lora_rank": 16}
COMMON = {
    "output_dir": "run", "stage": "SFT", "fine_tuning": "Full", "compute_type": "fp32",
    "train_dataset_path": "../train.jsonl", "max_seq_len": 512, "max_steps": 3, "batch_size": 4, "learning_rate": 1e-4,
    "save_strategy": "no", "moe_health_steps": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full_recomputed": {"recompute": True},
    "full_accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "lora": LORA,
    "wint8_lora": {**LORA, "compute_type": "wint8"},
    "wint4/8_lora": {**LORA, "compute_type": "wint4/8"},
    "dpo": {"stage": "DPO"},
    "dpo_lora": {"stage": "DPO", **LORA},
}
PAIR = {"batch_size": 2, "recompute": True}  # on each of two ranks, of which the first one is told about
PAIRS: dict[str, dict[str, Any]] = {
    "2_ranks": PAIR,
    "2_ranks_stage1": {**PAIR, "sharding": "stage1"},
    "2_ranks_stage2": {**PAIR, "sharding": "stage2"},
    "2_ranks_stage3": {**PAIR, "sharding": "stage3"},
}
CASES |= PAIRS
LOADS = ("wint8", "wint4/8", "nf4")

CARD = 80e9
SLICES = {"tensor": 8, "sequence_parallel": True}
MANY = SLICES | {"expert": 4, "sharding": 12, "stage": 3}
SEVEN = MANY | {"expert": 2, "sharding": 14}
EIGHT = {"expert": 8, "sharding": 8, "stage": 1}
HALVES = {"tensor": 4, "sequence_parallel": True, "expert": 2, "sharding": 2, "stage": 1}
ONE: dict[str, Any] = {}
PUBLISHED: tuple[tuple[str, dict[str, Any], int, int, dict[str, Any]], ...] = (  # and cards, and how they share
    ("ERNIE-4.5-300B-A47B", {"fine_tuning": "Full"}, 8192, 96, MANY),
    ("ERNIE-4.5-300B-A47B", {"fine_tuning": "Full"}, 32768, 112, SEVEN),
    ("ERNIE-4.5-300B-A47B", {"fine_tuning": "LoRA", "compute_type": "wint4/8"}, 8192, 4, SLICES | {"tensor": 4}),
    ("ERNIE-4.5-300B-A47B", {"fine_tuning": "LoRA", "compute_type": "wint4/8"}, 32768, 8, SLICES),
    ("ERNIE-4.5-300B-A47B", {"fine_tuning": "Full", "stage": "DPO"}, 8192, 112, SEVEN),
    ("ERNIE-4.5-300B-A47B", {"fine_tuning": "LoRA", "stage": "DPO"}, 8192, 16, SLICES | {"expert": 2}),
    ("ERNIE-4.5-21B-A3B", {"fine_tuning": "Full"}, 8192, 8, EIGHT),
    ("ERNIE-4.5-21B-A3B", {"fine_tuning": "Full"}, 131072, 8, HALVES),
    ("ERNIE-4.5-21B-A3B", {"fine_tuning": "LoRA", "compute_type": "wint4/8"}, 8192, 1, ONE),
    ("ERNIE-4.5-21B-A3B", {"fine_tuning": "Full", "stage": "DPO"}, 8192, 8, EIGHT),
    ("ERNIE-4.5-21B-A3B", {"fine_tuning": "LoRA", "stage": "DPO"}, 8192, 1, ONE),
    ("ERNIE-4.5-0.3B", {"fine_tuning": "Full"}, 8192, 1, ONE),
)


def published() -> list[dict[str, Any]]:
    """The budget of a card in every published setting, in GB."""
    from erniekit.config.cut import Cut
    from erniekit.config.families import family
    from erniekit.config.layout import Layout
    from erniekit.config.load import load_config
    from erniekit.training.budget import run_budget

    rows = []
    for name, keys, length, cards, shared in PUBLISHED:
        cfg = load_config({"compute_type": "bf16", "lora_rank": 32, "recompute": True, "max_seq_len": length} | keys)
        needed = run_budget(cfg, family(name), on_gpu=True, cut=Cut.of(Layout(cards, **shared), 0))
        counts = ("numbers", "trained")
        parts = {part: round(n / 1e9, 1) for part, n in dataclasses.asdict(needed).items() if part not in counts}
        total = needed.peak + needed.kernels
        rows.append({
            "model": name, **keys, "max_seq_len": length, "cards": cards, "layout": shared, "gb_of_a_card": parts,
            "gb": round(total / 1e9, 1), "fits": total < CARD,
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------------- measuring
def prepare(folder: Path) -> None:
    """Random text and a tokenizer for it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(3000)]

    def said(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    # Short ones: packed rows are full then, as the budget takes them to be.
    rows = [{"src": [said(4)], "tgt": [said(8)]} for _ in range(2000)]
    pairs = [{"question": said(4), "chosen": said(6), "rejected": said(6)} for _ in range(1500)]
    for name, lines in (("train", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    command = erniekit("init", "--family", "tiny-moe", "--train-tokenizer", "train.jsonl", "--out", "tokenizer")
    subprocess.run(command, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)


def make(folder: Path, model_name: str) -> None:
    """Write a random model of the sizes above."""
    import numpy as np

    from erniekit.checkpoint.folder import Folder
    from erniekit.checkpoint.model_io import save_model
    from erniekit.models.decoder import ErnieForCausalLM

    base, generator = Folder.open(folder / "tokenizer"), np.random.default_rng(0)
    model = ErnieForCausalLM(base.config.replace(**MODELS[model_name]))
    for name, p in model.named_parameters():
        drawn = generator.normal(0.0, 0.02, p.shape) if p.ndim > 1 else np.ones(p.shape)
        p.set_value((drawn * ("bias" not in name)).astype("float32"))
    save_model(model, folder / model_name, dtype="float32", base=base)


def load(folder: Path, kind: str) -> dict[str, int]:
    """The peak of a quantised load. Its budget is what stays; through the kernels goes a weight at a time, the largest
    of which is held dense, as codes, and as a tensor of codes."""
    import math

    from erniekit.checkpoint.folder import Folder
    from erniekit.checkpoint.model_io import build_model
    from erniekit.config.load import load_config
    from erniekit.config.packing import packing_of
    from erniekit.training.budget import Formats, Parameters
    from erniekit.training.memory import MemoryWatch

    cfg, base = load_config({"compute_type": kind, "fine_tuning": "LoRA"}), Folder.open(folder / "large")
    parameters = Parameters.of(load_config({}), base.config, head_bias=False)
    kept, through = 0, 0
    for name, shape in parameters.shapes.items():
        held = parameters.num_bytes(name, Formats.of(cfg, on_gpu=False))
        kept += held
        if "embed" not in name:
            through = max(through, 4 * math.prod(shape[-2:]) + 2 * held // math.prod(shape[:-2]))
    watch = MemoryWatch()
    build_model(base, base.config, pack=packing_of(cfg))
    return {"budget": kept, "kernels": through, "tensors": watch.tensors, "process": watch.process}


def work(*arguments: str) -> str:
    """This script's own process with other arguments."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment() | TIDY, check=True, capture_output=True, text=True).stdout


def train(folder: Path, keys: dict[str, Any], *, name: str, model: str) -> dict[str, int]:
    """What a run tells of its memory."""
    place = folder / name
    place.mkdir()
    own = {"model_name_or_path": f"../{model}"}
    if keys.get("stage") == "DPO":
        own["train_dataset_path"] = "../pairs.jsonl"
    (place / "run.yaml").write_text(json.dumps(COMMON | own | keys), encoding="utf-8")
    ranks = ("--nproc", "2") if name.rpartition("-")[0] in PAIRS else ()
    command = erniekit("train", "run.yaml", *ranks)
    done = subprocess.run(command, cwd=place, env=environment() | TIDY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: erniekit train ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads((place / "run" / "training" / "story.json").read_bytes())["memory"]


def compared(found: list[dict[str, int]]) -> dict[str, Any]:
    """Budget over measurement, and the figures of the rounds in MB; the first round's figures but for the process."""
    process = [round_["process"] for round_ in found]
    middle, first = statistics.median(process), found[0]
    return {
        "mb": {name: round(size / 1e6, 1) for name, size in first.items()} | {"process": round(middle / 1e6, 1)},
        "process_mb_of_rounds": [round(size / 1e6, 1) for size in process],
        "budget_over_tensors": round(first["budget"] / first["tensors"], 3),
        "budget_and_kernels_over_process": round((first["budget"] + first["kernels"]) / middle, 3),
    }


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Every case in turn."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("paddlepaddle", "numpy")}
    result: dict[str, Any] = {"commit": commit(), "machine": machine(), "versions": versions, "rounds": options.rounds}
    model = "small" if options.small else "base"
    result |= {"sizes": {"trained": MODELS[model], "loaded": MODELS["large"]}, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        if options.only:
            prepare(Path(folder))
        for wanted, names in ((model, CASES), ("large", [f"load_{kind}" for kind in LOADS])):
            if set(names) & set(options.only):
                work("--make", folder, wanted)
        for name in options.only:
            rounds = range(options.rounds)
            if name in CASES:
                path = name.replace("/", "")
                found = [train(Path(folder), CASES[name], name=f"{path}-{number}", model=model) for number in rounds]
            else:
                kind = name.removeprefix("load_")
                found = [json.loads(work("--load", folder, kind).splitlines()[-1]) for _ in rounds]
            result["cases"][name] = compared(found)
    return result | {"published": published()}


def main() -> None:
    """Measure, print the figures as JSON."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, *(f"load_{kind}" for kind in LOADS)]
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a model of four layers in place of six")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), options.make[1])
        return
    if options.load:
        print(json.dumps(load(Path(options.load[0]), options.load[1])))
        return
    text = json.dumps(bench(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
