"""What quantised weights cost a trained model: the error of every layer, the change of the eval loss, speed and size.

    python scripts/quantisation.py MODEL EVAL.jsonl [--formats wint8 wint4/8 wint4 nf4] [--groups default -1 64 128]
                                   [--folders wint8 fp8/128 wint2 ...] [--calibration TEXT] [--rounds 5] [--steps 2]
                                   [--out results.json]

MODEL is a folder with a tokenizer, EVAL.jsonl SFT rows that it was not trained on; scripts/quickstart.sh leaves both
(output/quickstart/sft and output/quickstart/data/eval.jsonl). Every format is loaded as a run loads it and compared
with the same folder in fp32. --folders are formats of `export --quantize` (behind a slash their group size): each is
exported, calibrated over TEXT, and loaded as `eval` and `chat` load it. An empty list leaves out what it names.

Speed: steps of LoRA (all linear layers and experts) on rows of random tokens, all bases in one process, rounds
alternating between them, so that a busy minute of the machine hits all alike; 0 rounds leave it out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from erniekit.base import runtime  # noqa: E402

runtime.prepare()

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from erniekit.adapters.lora import add_adapters  # noqa: E402
from erniekit.checkpoint.folder import Folder  # noqa: E402
from erniekit.checkpoint.load import load_for_answers  # noqa: E402
from erniekit.checkpoint.model_io import build_model  # noqa: E402
from erniekit.checkpoint.quantised_figures import layer_errors  # noqa: E402
from erniekit.checkpoint.quantised_folder import QuantisedFolder  # noqa: E402
from erniekit.checkpoint.save import REPORT_FILE  # noqa: E402
from erniekit.config.adapter import AdapterConfig  # noqa: E402
from erniekit.config.load import load_config  # noqa: E402
from erniekit.config.packing import EXPERTS, LINEARS, Packing, packing_of  # noqa: E402
from erniekit.data.batch import Batch  # noqa: E402
from erniekit.data.build import EvalData, build_eval_data  # noqa: E402
from erniekit.data.tokenizer import Tokenizer  # noqa: E402
from erniekit.models.decoder import ErnieForCausalLM  # noqa: E402
from erniekit.ops.attention import end_rows_from_segments  # noqa: E402
from erniekit.ops.cpu.library import tier  # noqa: E402
from erniekit.precision.packed import packed_weights  # noqa: E402
from erniekit.recipes.quantise import Settings, quantise  # noqa: E402
from erniekit.training.objective import LanguageModelObjective, LossWeights  # noqa: E402
from erniekit.training.optimizer import AdamWSettings, Optimizer  # noqa: E402
from erniekit.training.router import RouterUpkeep  # noqa: E402
from erniekit.training.step import train_step  # noqa: E402

FORMATS = ("wint8", "wint4/8", "wint4", "nf4")
FOLDERS = ("wint8", "wint8/64", "wint4", "wint4/64", "w4a8", "w4a8c8", "fp8", "fp8/128", "wint2.5", "wint2")
ROWS, LENGTH, RANK = 4, 512, 8
_PARTS = {"attention": r"\.self_attn\.", "experts": r"\.mlp\.experts\.", "other MLPs": r"\.mlp\.|mtp_linear_proj"}


def errors(model: ErnieForCausalLM, packed: ErnieForCausalLM) -> dict[str, Any]:
    """Relative error |dense - weight| / |weight| (Frobenius) of every packed weight, kind of layer and layer."""
    parameters = dict(model.named_parameters())
    squares: dict[str, tuple[float, float]] = {}
    for name, layer in packed_weights(packed).items():
        weight = parameters[name].numpy().reshape(layer.store.shape)
        dense = np.stack([layer.store.dense(i).numpy() for i in range(len(weight))])
        squares[name] = (float(((dense - weight) ** 2).sum()), float((weight**2).sum()))

    def share(names: list[str]) -> float:
        return math.sqrt(sum(squares[n][0] for n in names) / sum(squares[n][1] for n in names))

    parts: dict[str, list[str]] = {}
    layers: dict[str, list[str]] = {}
    for name in squares:
        parts.setdefault(next(part for part, pattern in _PARTS.items() if re.search(pattern, name)), []).append(name)
        layers.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return {
        "weights": {name: round(share([name]), 6) for name in squares},
        "parts": {part: round(share(names), 6) for part, names in parts.items()},
        "layers": {layer: round(share(names), 6) for layer, names in layers.items()},
        "all": round(share(list(squares)), 6),
    }


@paddle.no_grad()
def predictions(model: ErnieForCausalLM, data: EvalData) -> list[np.ndarray]:
    """Log-probabilities of the next token at every trained position, batch by batch."""
    made = []
    for batch in data.batches(4):
        ids, positions = paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.position_ids)
        trunk = model.trunk(ids, positions, end_rows_from_segments(paddle.to_tensor(batch.segment_ids)))
        hidden = trunk.hidden_BSD.flatten(0, 1)[paddle.to_tensor(_trained(batch))]
        logits = model.lm_head.logits(hidden).numpy()
        logits -= logits.max(-1, keepdims=True)
        made.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return made


def _trained(batch: Batch) -> np.ndarray:
    return np.flatnonzero(batch.labels >= 0)


def judged(found: list[np.ndarray], exact: list[np.ndarray], data: EvalData) -> dict[str, float]:
    """Loss on the held-out rows, mean KL from fp32's distribution, and how often the best token is the same."""
    loss, divergence, same, count = 0.0, 0.0, 0, 0
    for batch, there, here in zip(data.batches(4), exact, found, strict=True):
        labels = batch.labels.reshape(-1)[_trained(batch)]
        loss -= float(here[np.arange(len(labels)), labels].sum(dtype=np.float64))
        divergence += float((np.exp(there) * (there - here)).sum(dtype=np.float64))
        same += int((there.argmax(-1) == here.argmax(-1)).sum())
        count += len(labels)
    return {
        "loss": loss / count, "perplexity": math.exp(loss / count), "kl": divergence / count,
        "same_best_token": same / count, "tokens": count,
    }  # fmt: skip


def num_bytes(model: ErnieForCausalLM, packing: Packing | None) -> int:
    """What the weights take in memory."""
    total = sum(int(p.size) * p.element_size() for p in model.parameters())
    for name, weight in packed_weights(model).items():
        assert packing
        total += packing.num_bytes(name.removesuffix(".weight"), tuple(weight.shape))
    return total


def exported(name: str, options: argparse.Namespace, exact: list[np.ndarray], data: EvalData) -> dict[str, Any]:
    """A format as a folder, and what its model says."""
    kind, _, group = name.partition("/")
    settings = Settings(kind, int(group) if group else None, calibration=tuple(map(str, options.calibration or ())))
    with tempfile.TemporaryDirectory() as place:
        target = quantise(load_config({}), settings, folder=options.model, out=Path(place, "folder"))
        report, folder = json.loads((target / REPORT_FILE).read_bytes()), QuantisedFolder.open(target)
        found = judged(predictions(load_for_answers(target), data), exact, data)
        return {
            "bytes": report["bytes"], "bits_per_weight": report["bits_per_weight"],
            "bits_per_quantised_weight": report["bits_per_quantised_weight"], "mse": report["mse"],
            "error": layer_errors(folder, None), "eval": found,
        }  # fmt: skip


class Trained:
    """A base with adapters, and the time of its steps."""

    def __init__(self, model: ErnieForCausalLM) -> None:
        targets = [name for name, _ in model.named_sublayers() if re.search(LINEARS, name)]
        stacks = [name for name, _ in model.named_sublayers() if name.endswith(".mlp.experts")]
        targets += [f"{name}.{part}_proj" for name in stacks for part in ("gate_up", "down")]
        assert all(re.search(EXPERTS, name) or re.search(LINEARS, name) for name in targets)
        add_adapters(model, AdapterConfig(rank=RANK, alpha=2 * RANK, targets=tuple(targets)), seed=0)
        self.model, self.seconds, self.cpu_seconds = model, list[float](), list[float]()
        self.optimizer = Optimizer(model.named_parameters(), AdamWSettings(max_grad_norm=1.0))
        self.upkeep = RouterUpkeep(model, bias_coefficient=0.0, orthogonal_lambda=0.0)
        self.random = np.random.default_rng(0)

    def run(self, steps: int) -> None:
        """One round."""
        positions = np.arange(LENGTH)[None].repeat(ROWS, 0)
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            tokens = self.random.integers(3, self.model.config.vocab_size, [ROWS, LENGTH + 1])
            batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions))
            train_step(
                self.model, self.optimizer, batches=[batch], objective=LanguageModelObjective(LossWeights()),
                upkeep=self.upkeep, learning_rate=1e-4, row_length=LENGTH,
            )  # fmt: skip
        self.seconds.append((time.perf_counter() - started) / steps)
        self.cpu_seconds.append((time.process_time() - cpu) / steps)


def speeds(models: dict[str, ErnieForCausalLM], *, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens per second of LoRA on each base, and its CPU time, which neighbours hardly change, beside the first's."""
    sides = {name: Trained(model) for name, model in models.items()}
    for side in sides.values():
        side.run(1)
        side.seconds, side.cpu_seconds = [], []
    for _ in range(rounds):
        for side in sides.values():
            side.run(steps)
    first = next(iter(sides.values()))
    return {
        name: {
            "tokens_per_s": round(ROWS * LENGTH / statistics.median(side.seconds)),
            "rounds": [round(ROWS * LENGTH / seconds) for seconds in side.seconds],
            "cpu_seconds_per_step": round(statistics.median(side.cpu_seconds), 3),
            "of_fp32": round(statistics.median(side.cpu_seconds) / statistics.median(first.cpu_seconds), 3),
        }
        for name, side in sides.items()
    }


def commit() -> str:
    """The commit measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    folder = Folder.open(options.model)
    tokenizer = Tokenizer.from_folder(folder.path)
    keys = {"eval_dataset_path": str(options.data), "max_seq_len": LENGTH, "packing": True, "cache_data": False}
    data = build_eval_data(load_config(keys).data, tokenizer, stage="SFT", seed=0)
    whole = build_model(folder, folder.config)
    exact, size = predictions(whole, data), num_bytes(whole, None)
    plain = judged(exact, exact, data)
    print(f"fp32: eval loss {plain['loss']:.6f}, weights {size / 1e6:.1f} MB", flush=True)
    formats: dict[str, Any] = {"fp32": {"bytes": size, "eval": plain}}
    models = {"fp32": whole}
    for compute_type in options.formats:
        for group in options.groups:
            run = {"compute_type": compute_type} | ({} if group == "default" else {"group_size": int(group)})
            packing = packing_of(load_config(run))
            assert packing
            name = f"{compute_type}, " + (f"groups of {packing.group_size}" if packing.group_size else "per output")
            if name in formats:
                continue
            packed = build_model(folder, folder.config, pack=packing)
            found: dict[str, Any] = {
                "bytes": num_bytes(packed, packing), "error": errors(whole, packed),
                "eval": judged(predictions(packed, data), exact, data),
            }  # fmt: skip
            found["loss_change"] = found["eval"]["loss"] - plain["loss"]
            formats[name] = found
            print(
                f"{name}: error {found['error']['all']:.4f}, eval loss {found['loss_change']:+.6f}, "
                f"KL {found['eval']['kl']:.2e}, same best token {found['eval']['same_best_token']:.4f}, "
                f"weights {found['bytes'] / 1e6:.1f} MB", flush=True,
            )  # fmt: skip
            if group == "default":
                models[name] = packed
    folders: dict[str, Any] = {}
    for name in options.folders:
        folders[name] = found = exported(name, options, exact, data)
        found["loss_change"] = found["eval"]["loss"] - plain["loss"]
        print(
            f"{name}: {found['bits_per_quantised_weight']:.3f} bits, MSE {found['mse']:.3e}, error "
            f"{found['error']['error']:.4f}, perplexity {found['eval']['perplexity']:.3f}, eval loss "
            f"{found['loss_change']:+.6f}, KL {found['eval']['kl']:.2e}, same best token "
            f"{found['eval']['same_best_token']:.4f}, {found['bytes'] / 1e6:.1f} MB", flush=True,
        )  # fmt: skip
    result: dict[str, Any] = {
        "commit": commit(), "model": folder.path.name, "formats": formats, "folders": folders,
        "versions": {"paddle": paddle.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "machine": {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0], "kernels": tier()},
    }  # fmt: skip
    if options.rounds:
        found_speeds = speeds(models, rounds=options.rounds, steps=options.steps)
        result["lora_speed"] = found_speeds
        for name, speed in found_speeds.items():
            print(f"LoRA on {name}: {speed['tokens_per_s']:,} tokens/s, CPU time {speed['of_fp32']}", flush=True)
    return result


def main() -> None:
    """Read the options, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=FORMATS)
    parser.add_argument("--folders", nargs="*", choices=FOLDERS, default=FOLDERS)
    parser.add_argument("--calibration", nargs="+", type=Path, help="text for scales of inputs and searches of codes")
    parser.add_argument("--groups", nargs="+", default=("default", "-1", "64", "128"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of one base in a round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = json.dumps(measured(options), indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
