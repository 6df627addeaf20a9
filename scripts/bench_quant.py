"""How fast weights are quantised and made dense again, and what that takes of memory, for every format.

    python scripts/bench_quant.py [--inputs 2048] [--outputs 8192] [--rounds 5] [--formats wint8 fp8 ...] [--out FILE]

A weight of normal numbers [inputs, outputs], as large as the largest of a layer, goes through every format; rounds
alternate between formats, so that a busy minute of the machine hits all alike. Quantising is counted in bytes of the
weight as bf16, in which models are published; decoding (the encoder's, in numpy, and the kernel that products take)
in bytes of fp32 that are written. Memory: the most that is there beside the weight and what comes out, in a process of
its own, whose allocator gives everything back at once. The error of the codes stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_train import commit, machine, spread
from prove_resume import ROOT

sys.path.insert(0, str(ROOT))

from erniekit.base import runtime

runtime.prepare()

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from erniekit.base.resources import forget_peak, peak_resident, resident  # noqa: E402
from erniekit.checkpoint.quantised import encoder_of  # noqa: E402
from erniekit.ops.cpu.library import tier  # noqa: E402
from erniekit.precision.encoders import Encoder  # noqa: E402
from erniekit.precision.stored import StoredCodes  # noqa: E402

FORMATS: dict[str, Callable[[], Encoder]] = {
    "wint8": lambda: encoder_of("wint8"),
    "wint8, groups of 128": lambda: encoder_of("wint8", group_size=128),
    "wint4": lambda: encoder_of("wint4"),
    "wint4, groups of 128": lambda: encoder_of("wint4", group_size=128),
    "w4a8": lambda: encoder_of("w4a8"),
    "fp8": lambda: encoder_of("fp8"),
    "fp8, blocks of 128": lambda: encoder_of("fp8_blocks"),
    "wint2.5": lambda: encoder_of("wint2.5"),
    "wint2": lambda: encoder_of("wint2"),
}


class Side:
    """A format and what was measured of it."""

    def __init__(self, encoder: Encoder, weight: np.ndarray) -> None:
        self.encoder, self.weight = encoder, weight
        self.seconds: dict[str, list[float]] = {"quantise": [], "decode": [], "kernel": []}
        self.facts: dict[str, float] = {}

    def run(self, squares: np.ndarray) -> None:
        """One round."""
        arrays = self._timed("quantise", lambda: self.encoder.encode(self.weight, name="w", hessian_diag=squares))
        dense = self._timed("decode", lambda: self.encoder.decode(arrays, num_in=len(self.weight)))
        store = StoredCodes(self.encoder, (1, *self.weight.shape), dtype="float32")
        store.take(0, arrays, None)
        started = time.perf_counter()
        kernel = store.dense(0)
        self.seconds["kernel"].append(time.perf_counter() - started)
        assert np.array_equal(kernel.numpy(), dense), "the kernel decodes something else"
        size, error = self.weight.size, float(np.square(dense - self.weight).mean(dtype=np.float64))
        self.facts = {
            "bits_per_weight": round(8 * sum(array.nbytes for array in arrays.values()) / size, 4),
            "mse": round(error / float(np.square(self.weight).mean(dtype=np.float64)), 6),
        }

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = work()
        self.seconds[what].append(time.perf_counter() - started)
        return made

    def figures(self) -> dict[str, Any]:
        """Of all rounds."""
        size = self.weight.size
        rates = {name: [size / each for each in found] for name, found in self.seconds.items()}
        return self.facts | {
            "quantise_gb_per_s": spread([2 * rate / 1e9 for rate in rates["quantise"]], digits=4),
            "quantise_million_weights_per_s": spread([rate / 1e6 for rate in rates["quantise"]], digits=2),
            "decode_gb_per_s": spread([4 * rate / 1e9 for rate in rates["decode"]], digits=3),
            "kernel_gb_per_s": spread([4 * rate / 1e9 for rate in rates["kernel"]], digits=3),
        }


def peaks(encoder: Encoder, weight: np.ndarray, squares: np.ndarray) -> dict[str, float]:
    """MB that quantising and decoding have beside what they are given and what they give."""

    def measured(work: Callable[[], Any], kept: Callable[[Any], int]) -> tuple[Any, float]:
        before = resident()
        forget_peak()
        made = work()
        return made, round((peak_resident() - before - kept(made)) / 1e6, 1)

    encoder.encode(weight[:128, :256], name="w")  # libraries and threads come to life
    arrays, quantise = measured(
        lambda: encoder.encode(weight, name="w", hessian_diag=squares),
        lambda made: sum(array.nbytes for array in made.values()),
    )
    _, decode = measured(lambda: encoder.decode(arrays, num_in=len(weight)), lambda made: made.nbytes)
    return {"quantise": quantise, "decode": decode}


def peaks_apart(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--formats", name, "--peaks"]
    command += ["--inputs", str(options.inputs), "--outputs", str(options.outputs)]
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measure, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    parser.add_argument("--peaks", action="store_true", help="only the memory of the first format")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    weight = random.standard_normal((options.inputs, options.outputs), np.float32)
    squares = random.uniform(0.5, 2, options.inputs).astype(np.float32)
    if options.peaks:
        print(json.dumps(peaks(FORMATS[options.formats[0]](), weight, squares)))
        return
    result: dict[str, Any] = {
        "commit": commit(), "machine": {**machine(), "kernels": tier(), "threads": runtime.num_threads()},
        "versions": {"paddle": paddle.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "weight": [options.inputs, options.outputs], "rounds": options.rounds,
    }  # fmt: skip
    sides = {name: Side(FORMATS[name](), weight) for name in options.formats}
    warm = weight[:128, :256]
    for side in sides.values():
        Side(side.encoder, warm).run(squares[:128])
    for _ in range(options.rounds):
        for side in sides.values():
            side.run(squares)
    result["formats"] = {name: side.figures() | {"peak_mb": peaks_apart(name, options)} for name, side in sides.items()}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
