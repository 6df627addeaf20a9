"""Speed and memory of `convert` against the size of the model.

    python scripts/bench_convert.py [--megabytes 250 1000] [--repeats 3] [--out results.json]

Writes random bfloat16 models of the asked sizes (a 21B-like layer shape), converts each -Paddle -> -PT and back in a
process of its own, and reports GB/s (model bytes over wall time, fsync and sha256 included) and the peak of resident
memory above a process that only imported the same code, beside the size of the model and of its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from erniekit.checkpoint import create as creating
from erniekit.checkpoint.folder import Folder
from erniekit.config.families import FAMILIES
from erniekit.version import __version__

_ONE_CONVERSION = """
import json, sys, time
from erniekit.checkpoint.convert import convert

def memory(field):  # not getrusage: its peak includes what the parent had when it forked
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

source, target, to = sys.argv[1:]
base, start = memory("VmRSS"), time.perf_counter()
convert(source, target, to=to)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": memory("VmHWM"), "base": base}))
"""
# Two layers as in the 21B model; the number of experts sets the size.
_SHAPE = {
    **FAMILIES["ERNIE-4.5-21B-A3B"], "vocab_size": 32768, "num_hidden_layers": 2, "moe_layer_end_index": 1, "moe_k": 2,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
_EXPERT_BYTES = 2 * 3 * _SHAPE["hidden_size"] * _SHAPE["moe_intermediate_size"]


def make_model(folder: Path, *, megabytes: int) -> int:
    """Write a -Paddle model of about this size in shards of a quarter of it; returns its number of bytes."""
    rest = 450_000_000
    experts = max(2, (megabytes * 1_000_000 - rest) // _EXPERT_BYTES)
    FAMILIES["bench-convert"] = {**_SHAPE, "moe_num_experts": experts}
    creating.create("bench-convert", folder, layout="paddle", max_shard_bytes=megabytes * 250_000)
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def convert_once(source: Path, target: Path, to: str) -> dict[str, float]:
    """One conversion in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", _ONE_CONVERSION, str(source), str(target), to],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def bench(work: Path, *, megabytes: int, repeats: int) -> dict[str, Any]:
    """All conversions of one model size."""
    paddle, pt, back = work / "paddle", work / "pt", work / "back"
    num_bytes = make_model(paddle, megabytes=megabytes)
    folder = Folder.open(paddle)
    largest = max(folder.read_tensor(name).nbytes for name in folder.names)
    runs: dict[str, list[dict[str, float]]] = {"paddle_to_pt": [], "pt_to_paddle": []}
    for _ in range(repeats):
        shutil.rmtree(pt, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)
        runs["paddle_to_pt"].append(convert_once(paddle, pt, "pt"))
        runs["pt_to_paddle"].append(convert_once(pt, back, "paddle"))
    equal = all(path.read_bytes() == (back / path.name).read_bytes() for path in paddle.glob("model*.safetensors"))
    result: dict[str, Any] = {"model_bytes": num_bytes, "largest_tensor_bytes": largest, "round_trip_equal": equal}
    for name, measured in runs.items():
        speeds = sorted(num_bytes / run["seconds"] / 1e9 for run in measured)
        peaks = [run["peak"] - run["base"] for run in measured]
        result[name] = {
            "gb_per_s": {
                "median": round(statistics.median(speeds), 3), "lowest": round(speeds[0], 3),
                "highest": round(speeds[-1], 3),
            },
            "peak_rss_above_imports_bytes": max(peaks),
            "peak_over_model": round(max(peaks) / num_bytes, 3),
        }  # fmt: skip
    return result


def versions() -> dict[str, str]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "erniekit": __version__, "commit": commit or "none", "python": platform.python_version(),
        "numpy": np.__version__, "ml_dtypes": ml_dtypes.__version__,
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip


def main() -> None:
    """Read the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    sizes = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(prefix="bench-convert-") as work:
            sizes.append(bench(Path(work), megabytes=megabytes, repeats=args.repeats))
    text = json.dumps({"versions": versions(), "repeats": args.repeats, "sizes": sizes}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
