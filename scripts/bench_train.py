"""Speed and memory of a training step, beside transformers + torch on the same machine in the same run.

    python scripts/bench_train.py [--model moe|dense] [--rounds 7] [--steps 3] [--threads 2]
                                  [--peer-python PATH] [--plain] [--out results.json]

Every side is a process of its own that waits for orders; rounds alternate between them, so that a busy minute of the
machine hits all alike. Ours takes the project's own step, optimizer and objective; the peer the same architecture from
transformers with torch's fastest AdamW. Both fp32, same rows of random tokens, global-norm clipping. --plain adds our
side on Paddle's own operators. Without torch the peer is left out and the result says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH, SEED = 4, 512, 0
WARM_UP_STEPS = 2
RATE, DECAY, CLIP = 1e-4, 0.1, 1.0

DENSE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True, "hidden_act": "silu", "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "model_type": "ernie4_5",
}  # fmt: skip
MOE = DENSE | {
    "model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 256,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"dense": DENSE, "moe": MOE}

Step = Callable[[Any], float]  # takes an int64 array [ROWS, LENGTH + 1], trains one step, returns the loss


def our_step(settings: dict[str, Any]) -> tuple[Step, dict[str, str]]:
    """A training step of this repository, and the versions behind it."""
    sys.path.insert(0, str(ROOT))
    from erniekit.base import runtime

    runtime.prepare()
    import numpy as np
    import paddle

    from erniekit.config.architecture import ErnieConfig
    from erniekit.data.batch import Batch
    from erniekit.models.decoder import ErnieForCausalLM
    from erniekit.ops.dispatch import backend
    from erniekit.training.objective import LanguageModelObjective, LossWeights
    from erniekit.training.optimizer import AdamWSettings, Optimizer
    from erniekit.training.router import RouterUpkeep
    from erniekit.training.step import train_step

    model, rng = ErnieForCausalLM(ErnieConfig.from_dict(settings)), np.random.default_rng(SEED)
    for name, p in model.named_parameters():
        drawn = rng.normal(0.0, 0.02, p.shape) if "norm" not in name and "bias" not in name else np.ones(p.shape)
        p.set_value((drawn * ("bias" not in name)).astype("float32"))
    optimizer = Optimizer(model.named_parameters(), AdamWSettings(weight_decay=DECAY, max_grad_norm=CLIP))
    upkeep = RouterUpkeep(model, bias_coefficient=0.0, orthogonal_lambda=0.0)
    positions = np.arange(LENGTH)[None].repeat(ROWS, 0)

    def step(tokens: Any) -> float:
        batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions))
        return train_step(
            model, optimizer, batches=[batch], objective=LanguageModelObjective(LossWeights()), upkeep=upkeep,
            learning_rate=RATE, row_length=LENGTH,
        ).loss  # fmt: skip

    return step, {"paddle": paddle.__version__, "kernels": backend(paddle.ones([1]))}


def peer_step(settings: dict[str, Any]) -> tuple[Step, dict[str, str]]:
    """The same of transformers and torch, with what is fastest there."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    torch.manual_seed(SEED)
    kind = "Ernie4_5_Moe" if settings["model_type"] == "ernie4_5_moe" else "Ernie4_5"
    own = {name: value for name, value in settings.items() if name != "model_type"}
    config = getattr(transformers, f"{kind}Config")(**own, use_cache=False)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)

    def step(tokens: Any) -> float:
        ids = torch.from_numpy(tokens)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, {"torch": torch.__version__, "transformers": transformers.__version__}


def work(side: str, model: str) -> None:
    """A side's process: says when it is ready, then takes numbers of steps from its standard input."""
    import numpy as np

    step, versions = (peer_step if side == "peer" else our_step)(MODELS[model])
    rng = np.random.default_rng(SEED)

    def batch() -> Any:
        return rng.integers(3, MODELS[model]["vocab_size"], [ROWS, LENGTH + 1])

    first = step(batch())
    for _ in range(WARM_UP_STEPS - 1):
        step(batch())
    print(json.dumps({"versions": versions, "first_loss": first}), flush=True)
    for line in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = step(batch())
        figures = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(figures | {"loss": loss, "peak_bytes": _memory_peak()}), flush=True)


def _memory_peak() -> int:
    # Not getrusage: its peak includes what the parent had when it forked.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def _busy_seconds() -> float:
    """CPU seconds that the whole machine has been at work."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Side:
    """One process under measurement."""

    def __init__(self, side: str, python: str, model: str, environment: dict[str, str]) -> None:
        self.rates: list[float] = []
        self.others: list[float] = []  # cores that other processes kept busy in a round
        self.last: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--work", side, "--model", model],
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next line that is JSON."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a side ended with exit code {self._process.wait()}; its errors stand above")

    def run(self, steps: int) -> None:
        """One round."""
        assert self._process.stdin is not None
        busy = _busy_seconds()
        print(steps, file=self._process.stdin, flush=True)
        self.last = self.answer()
        others = _busy_seconds() - busy - self.last["cpu_seconds"]
        self.others.append(round(max(others, 0.0) / self.last["seconds"], 2))
        self.rates.append(steps * ROWS * LENGTH / self.last["seconds"])

    def figures(self) -> dict[str, Any]:
        """Tokens per second over the rounds, what disturbed them, and the peak of memory."""
        rates = sorted(self.rates)
        return {
            "tokens_per_s": {
                "median": round(statistics.median(rates)), "least": round(rates[0]), "most": round(rates[-1]),
            },
            "rounds": [round(rate) for rate in self.rates],
            "cores_busy_elsewhere": self.others,
            "peak_mb": round(self.last["peak_bytes"] / 1e6),
            "loss": self.last["loss"],
        }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}


def commit() -> str:
    """The commit measured, marked if files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Start every side, alternate between them, and compare."""
    threads = {"MKL_NUM_THREADS": str(options.threads), "BENCH_THREADS": str(options.threads)}
    result = {"model": options.model, "threads": options.threads, "steps_per_round": options.steps, "commit": commit()}
    result |= {"machine": machine(), "rows": ROWS, "row_length": LENGTH, "python": platform.python_version()}
    plans = {"ours": (sys.executable, threads)}
    if options.plain:
        plans["plain"] = (sys.executable, threads | {"ERNIEKIT_PLAIN_OPS": "1"})
    asked = subprocess.run([options.peer_python, "-c", "import torch, transformers"], capture_output=True, check=False)
    if asked.returncode == 0:
        plans["peer"] = (options.peer_python, {"BENCH_THREADS": str(options.threads)})
    else:
        result["peer"] = f"absent: torch and transformers are not importable in {options.peer_python} (--peer-python)"
    sides: dict[str, Side] = {}
    for name, (python, environment) in plans.items():
        sides[name] = Side(name, python, options.model, environment)
        result[f"{name}_starts"] = sides[name].answer()  # one after the other: start-up disturbs nobody's rounds
    for _ in range(options.rounds):
        for side in sides.values():
            side.run(options.steps)
    result |= {name: side.figures() for name, side in sides.items()}
    for name in sides.keys() - {"ours"}:
        ratios = [a / b for a, b in zip(sides["ours"].rates, sides[name].rates, strict=True)]
        result[f"ours_over_{name}"] = {
            "median": round(statistics.median(ratios), 3), "rounds": [round(ratio, 2) for ratio in ratios],
        }  # fmt: skip
    return result


def main() -> None:
    """Read the options, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="moe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of one side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--plain", action="store_true", help="measure Paddle's own operators as well")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", choices=("ours", "plain", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.model)
        return
    text = json.dumps(bench(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
