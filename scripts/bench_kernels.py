"""Triton's kernels on a Hopper GPU, beside torch in bf16 and what the chip can do. Needs torch and triton, no Paddle.

    python scripts/bench_kernels.py [--rounds 7] [--repeats 10] [--shapes 21B-A3B 300B-A47B] [--only FP8] [--out FILE]
    python scripts/bench_kernels.py --interpret     correctness alone, tiny shapes, on any CPU
    python scripts/bench_kernels.py --compile       only compile for Hopper, at the true shapes, on any machine

Every kernel is checked in the run that times it, against torch in fp32 or fp64. Rounds go through all contenders in
turn, so that a busy or hot minute hits all alike; each round's time is that of `repeats` launches between two events.
Operands are larger than the L2 cache. TFLOP/s counts products, GB/s each operand read once and each result written
once. Products of experts stand beside two peers: torch's own product for each expert, and one torch product with the
same number of operations, which no routing slows. Moves stand beside a copy of as many bytes. Without a Hopper GPU
nothing is timed, and the JSON says so. Exit code 1 if a kernel computes something wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = "not run: no Hopper GPU"

# TFLOP/s without sparsity and TB/s of NVIDIA's data sheets; the first name that the device's contains.
CHIPS = (
    ("H100 PCIe", {"fp8": 1513, "bf16": 756, "tb_per_s": 2.0}),
    ("H100 NVL", {"fp8": 1671, "bf16": 835, "tb_per_s": 3.9}),
    ("H100", {"fp8": 1979, "bf16": 989, "tb_per_s": 3.35}),
    ("H800", {"fp8": 1979, "bf16": 989, "tb_per_s": 3.35}),
    ("H200", {"fp8": 1979, "bf16": 989, "tb_per_s": 4.8}),
    ("H20", {"fp8": 296, "bf16": 148, "tb_per_s": 4.0}),
)


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--shapes", nargs="+", default=["21B-A3B", "300B-A47B"])
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="", help="kernels with these words in their name")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def commit() -> str:
    """The commit measured, marked if files differ from it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from bench_train import commit as of_repository

    return of_repository()


def provenance() -> dict[str, Any]:
    """What a figure depends on."""
    import torch
    import triton

    found: dict[str, Any] = {
        "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": chip.name, "capability": [chip.major, chip.minor], "multiprocessors": chip.multi_processor_count,
            "memory": chip.total_memory,
        }  # fmt: skip
    return found


def limits(name: str) -> dict[str, float] | None:
    """What the chip can do, if it is known."""
    return next((figures for part, figures in CHIPS if part in name), None)


def milliseconds(run: Any, repeats: int) -> float:
    """The time of one launch among `repeats`."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def timed(case: Any, *, rounds: int, repeats: int, chip: dict[str, float] | None) -> dict[str, Any]:
    """All contenders of a case, round by round."""
    contenders = {f"ours {setting}" if setting else "ours": lambda s=setting: case.run(s) for setting in case.settings}
    contenders |= case.peers
    for run in contenders.values():
        run()  # compiles
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(milliseconds(run, repeats))
    out = {}
    for name, spread in times.items():
        middle = statistics.median(spread)
        figures = {"ms": {"median": middle, "least": min(spread), "most": max(spread)}}
        figures["gb_per_s"] = case.bytes / middle / 1e6
        if case.flops:
            figures["tflops"] = case.flops / middle / 1e9
        if chip and name.startswith("ours"):
            share = case.flops / 1e9 / chip[case.numbers] if case.flops else case.bytes / 1e9 / chip["tb_per_s"]
            figures["share_of_chip"] = share / middle
        out[name] = figures
    return out


def checked(case: Any, settings: Any) -> dict[str, Any]:
    """The largest error of a case with any of the settings, against its limit."""
    errors = []
    for setting in settings:
        for result in case.results:
            result.fill_(float("nan"))  # what the last setting wrote must not help this one
        case.run(setting)
        errors.append(float(case.error()))
    return {"error": max(errors), "limit": case.limit, "correct": max(errors) <= case.limit}


def compiled(shapes: list[str], only: str) -> list[dict[str, Any]]:
    """The kernels at the true shapes, compiled for Hopper without one: tensors without memory, nothing launched."""
    import kernel_cases
    from kernel_compiler import compiling

    with compiling() as found:
        for shape in shapes:
            for case in kernel_cases.cases(kernel_cases.SHAPES[shape], "meta"):
                for setting in case.settings if only in case.name else ():
                    case.run(setting)
                    for kernel in found:
                        kernel.setdefault("case", f"{shape}: {case.name}")
                        kernel.setdefault("setting", str(setting) if setting else "")
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The JSON's content."""
    missing = [name for name in ("torch", "triton") if not importlib.util.find_spec(name)]
    if missing:
        return {"status": f"{NOT_RUN}, and {' and '.join(missing)} not installed"}
    if given.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    import torch

    result = provenance()
    if given.compile:
        return result | {"status": f"compiled for sm_90, {NOT_RUN}", "kernels": compiled(given.shapes, given.only)}
    import kernel_cases

    if given.interpret:
        from erniekit.ops.triton.interpreter import put_right

        put_right()
        shapes, device, status = [kernel_cases.TINY], "cpu", f"correctness in Triton's interpreter; speed {NOT_RUN}"
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return result | {"status": NOT_RUN}
    else:
        shapes, device, status = [kernel_cases.SHAPES[name] for name in given.shapes], "cuda", "run"
        result["chip"] = limits(result["device"]["name"])
    rows = []
    for shape in shapes:
        for case in kernel_cases.cases(shape, device):
            if given.only not in case.name:
                continue
            row: dict[str, Any] = {"shape": shape.name, "kernel": case.name}
            row |= checked(case, case.settings[:1] if given.interpret else case.settings)
            if device == "cuda":
                row["contenders"] = timed(case, rounds=given.rounds, repeats=given.repeats, chip=result["chip"])
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return result | {"status": status, "rounds": given.rounds, "repeats": given.repeats, "kernels": rows}


def main() -> int:
    """Print the JSON; the exit code says whether every kernel was right."""
    given = options()
    result = measure(given)
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(not row.get("correct", True) for row in result.get("kernels", ())))


if __name__ == "__main__":
    sys.exit(main())
