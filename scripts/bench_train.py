"""Speed and memory of a training step, beside transformers + torch on the same machine in the same run.

    python scripts/bench_train.py [--tier cpp numpy plain] [--bf16] [--model moe|dense] [--rounds 7] [--steps 3]
                                  [--threads 2] [--peer-python PATH] [--out results.json]

Every side is a process of its own that waits for orders; rounds alternate between them, so that a busy minute of the
machine hits all alike. Ours takes the project's own step, optimizer and objective, with the CPU kernels that --tier
names (compiled, in numpy, Paddle's own operators; each is a side); the peer the same architecture from transformers
with torch's fastest AdamW. Same rows of random tokens, global-norm clipping. All fp32; with --bf16 ours rounds the
inputs of matrix products (cpu_bf16_matmul) and the peer is measured twice, under bf16 autocast with fp32 weights and
with everything in bf16. Without torch the peer is left out and the result says so.

On a shared machine, compare the CPU seconds of a step too: neighbours hardly change them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
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

TIERS = {"cpp": {}, "numpy": {"ERNIEKIT_NUMPY_OPS": "1"}, "plain": {"ERNIEKIT_PLAIN_OPS": "1"}}  # name -> environment
PEERS = {"fp32": ("torch",), "bf16": ("torch_autocast", "torch_bf16")}

Step = Callable[[Any], float]  # takes an int64 array [ROWS, LENGTH + 1], trains one step, returns the loss


def our_step(settings: dict[str, Any], precision: str) -> tuple[Step, dict[str, str]]:
    """A training step of this repository, and the versions behind it."""
    sys.path.insert(0, str(ROOT))
    from erniekit.base import runtime

    runtime.prepare()
    import numpy as np
    import paddle

    from erniekit.config.architecture import ErnieConfig
    from erniekit.data.batch import Batch
    from erniekit.models.decoder import ErnieForCausalLM
    from erniekit.ops.cpu.library import tier
    from erniekit.precision.products import use_bf16_products
    from erniekit.training.objective import LanguageModelObjective, LossWeights
    from erniekit.training.optimizer import AdamWSettings, Optimizer
    from erniekit.training.router import RouterUpkeep
    from erniekit.training.step import train_step

    model, rng = ErnieForCausalLM(ErnieConfig.from_dict(settings)), np.random.default_rng(SEED)
    for name, p in model.named_parameters():
        drawn = rng.normal(0.0, 0.02, p.shape) if "norm" not in name and "bias" not in name else np.ones(p.shape)
        p.set_value((drawn * ("bias" not in name)).astype("float32"))
    if precision == "bf16":
        use_bf16_products(model)
    optimizer = Optimizer(model.named_parameters(), AdamWSettings(weight_decay=DECAY, max_grad_norm=CLIP))
    upkeep = RouterUpkeep(model, bias_coefficient=0.0, orthogonal_lambda=0.0)
    positions = np.arange(LENGTH)[None].repeat(ROWS, 0)

    def step(tokens: Any) -> float:
        batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions))
        return train_step(
            model, optimizer, batches=[batch], objective=LanguageModelObjective(LossWeights()), upkeep=upkeep,
            learning_rate=RATE, row_length=LENGTH,
        ).loss  # fmt: skip

    return step, {"paddle": paddle.__version__, "kernels": "plain" if runtime.plain_ops() else tier()}


def peer_step(settings: dict[str, Any], name: str) -> tuple[Step, dict[str, str]]:
    """The same of transformers and torch, with what is fastest there; `name` is one of PEERS."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    torch.manual_seed(SEED)
    kind = "Ernie4_5_Moe" if settings["model_type"] == "ernie4_5_moe" else "Ernie4_5"
    own = {name: value for name, value in settings.items() if name != "model_type"}
    config = getattr(transformers, f"{kind}Config")(**own, use_cache=False)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().train()
    if name == "torch_bf16":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)

    def step(tokens: Any) -> float:
        ids = torch.from_numpy(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "torch_autocast"):
            logits = model(ids[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, {"torch": torch.__version__, "transformers": transformers.__version__}


def work(side: str, model: str, precision: str) -> None:
    """A side's process: says when it is ready, then takes numbers of steps from its standard input."""
    import numpy as np

    ours = side in TIERS
    step, versions = our_step(MODELS[model], precision) if ours else peer_step(MODELS[model], side)
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

    def __init__(self, name: str, python: str, options: argparse.Namespace) -> None:
        """Start it; `answer` says when it is ready."""
        self.rates: list[float] = []
        self.cpu_seconds: list[float] = []  # of one step
        self.others: list[float] = []  # cores that other processes kept busy in a round
        self.last: dict[str, Any] = {}
        threads = {"MKL_NUM_THREADS": str(options.threads), "BENCH_THREADS": str(options.threads)}
        command = [python, "-W", "ignore", __file__, "--work", name, "--model", options.model]
        self._process = subprocess.Popen(
            command + ["--bf16"] * options.bf16, env=os.environ | threads | TIERS.get(name, {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
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
        self.cpu_seconds.append(self.last["cpu_seconds"] / steps)

    def figures(self) -> dict[str, Any]:
        """Tokens per second over the rounds, what disturbed them, and the peak of memory."""
        return {
            "tokens_per_s": spread(self.rates, digits=0),
            "cpu_seconds_per_step": spread(self.cpu_seconds, digits=3),
            "rounds": [round(rate) for rate in self.rates],
            "cores_busy_elsewhere": self.others,
            "peak_mb": round(self.last["peak_bytes"] / 1e6),
            "loss": self.last["loss"],
        }


def spread(values: list[float], *, digits: int) -> dict[str, float]:
    """Median, least and most."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def compare(ours: Side, theirs: Side) -> dict[str, Any]:
    """How many times as fast ours is, round by round, by the clock and by CPU time."""
    speeds = [a / b for a, b in zip(ours.rates, theirs.rates, strict=True)]
    work = [b / a for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True)]
    by_clock = spread(speeds, digits=2) | {"rounds": [round(ratio, 2) for ratio in speeds]}
    return {"by_clock": by_clock, "by_cpu_seconds": spread(work, digits=2)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}


def commit() -> str:
    """The commit measured, marked if files differ from it."""
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Start every side, alternate between them, and compare."""
    precision = "bf16" if options.bf16 else "fp32"
    result = {"model": options.model, "threads": options.threads, "steps_per_round": options.steps, "commit": commit()}
    result |= {"precision": precision, "machine": machine(), "rows": ROWS, "row_length": LENGTH}
    result |= {"python": platform.python_version(), "starts": {}}
    plans = dict.fromkeys(options.tier, sys.executable)
    asked = subprocess.run([options.peer_python, "-c", "import torch, transformers"], capture_output=True, check=False)
    if asked.returncode == 0:
        plans |= dict.fromkeys(PEERS[precision], options.peer_python)
    else:
        result["peer"] = f"absent: torch and transformers are not importable in {options.peer_python} (--peer-python)"
    sides: dict[str, Side] = {}
    for name, python in plans.items():
        sides[name] = Side(name, python, options)
        result["starts"][name] = sides[name].answer()  # one after the other: start-up disturbs nobody's rounds
    for _ in range(options.rounds):
        for side in sides.values():
            side.run(options.steps)
    result["sides"] = {name: side.figures() for name, side in sides.items()}
    first, *others = sides
    pairs = [(ours, theirs) for ours in options.tier for theirs in sides if theirs not in TIERS]
    pairs += [(first, other) for other in others if other in TIERS]
    result["ratios"] = {f"{ours} over {theirs}": compare(sides[ours], sides[theirs]) for ours, theirs in pairs}
    return result


def main() -> None:
    """Read the options, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="moe")
    parser.add_argument("--tier", choices=TIERS, nargs="+", default=["cpp"], help="which of our CPU kernels")
    parser.add_argument("--bf16", action="store_true", help="cpu_bf16_matmul, and the peer in bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of one side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", choices=[*TIERS, *PEERS["fp32"], *PEERS["bf16"]], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.model, "bf16" if options.bf16 else "fp32")
        return
    text = json.dumps(bench(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
