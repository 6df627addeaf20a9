"""scripts/bench_kernels.py where there is no GPU: its checks in Triton's interpreter on torch's tensors, and what the
compiler makes of the kernels for Hopper (extra `parity`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = bool(importlib.util.find_spec("triton"))
pytestmark = [pytest.mark.parity, pytest.mark.skipif(not HAS_TRITON, reason="needs triton (extra parity)")]


WITHOUT_PADDLE = (
    "import runpy, sys; sys.modules['paddle'] = None; sys.argv = sys.argv[1:];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def bench(*arguments: str) -> dict:
    """What the script prints where Paddle cannot be imported, as beside torch and Triton alone."""
    command = [sys.executable, "-c", WITHOUT_PADDLE, "scripts/bench_kernels.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_computes_what_torch_does():
    found = bench("--interpret")
    assert found["status"] == "correctness in Triton's interpreter; speed not run"
    wrong = [row for row in found["kernels"] if not row["correct"]]
    assert wrong == []
    names = {row["kernel"] for row in found["kernels"]}
    assert len(names) == 23
    assert {"FP8 down forward", "gradient of the sum's weights", "weighted SwiGLU backward + quantise"} < names


def test_products_compile_to_hoppers_own_instructions():
    """FP8 operands go to the tensor cores as FP8, and nothing spills from the registers. Nothing runs."""
    found = bench("--compile", "--shapes", "21B-A3B", "--only", "FP8 down")
    assert found["status"] == "compiled for sm_90; not run"
    assert {kernel["kernel"] for kernel in found["kernels"]} >= {"_product8", "_weight_product8"}
    for kernel in found["kernels"]:
        if kernel["kernel"] in ("_product8", "_weight_product8"):
            assert kernel["wgmma"].get("fp8", 0) > 0
        assert (kernel["slower_mma"], kernel["stack"], kernel["local"]) == (0, 0, 0)


def test_the_kernels_know_no_framework():
    code = (
        "import sys; from erniekit.ops.triton import grouped, moves, quantise, swiglu;"
        "print(*{'paddle', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
