"""Triton's kernels on a Hopper GPU, beside torch in bf16 and what the chip can do. Needs torch and triton, no Paddle.

    python scripts/bench_kernels.py [--rounds 7] [--repeats 10] [--shapes 21B-A3B 300B-A47B] [--only FP8] [--out FILE]
    python scripts/bench_kernels.py --interpret     correctness alone, tiny shapes, on any CPU
    python scripts/bench_kernels.py --compile       only compile for Hopper, at the true shapes, on any machine

Every kernel is checked before it is timed, in the same run, against torch in fp32 or fp64. Each launch is timed by
itself, between two events, after the L2 cache was filled with something else; the GPU waits until all launches of a
round are queued, so that the host's time between them is not counted. Rounds go through all contenders in turn, so that
a busy or hot minute hits all alike; a first round is thrown away. TFLOP/s counts products, GB/s each operand read once
and each result written once. Products of experts stand beside two peers: torch's own product for each expert, and one
torch product with the same number of operations, which no routing slows. Moves stand beside a copy of as many bytes.

Without a Hopper GPU nothing is timed, the JSON says "not run", and the exit code is 0. It is 1 if a kernel fails or
computes something wrong, or if --only names none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("21B-A3B", "300B-A47B")
FLUSHED = 256 << 20  # bytes written between two launches: several L2 caches
WAIT = 2_000_000  # cycles of the GPU for a launch to be queued, about 1 ms

# TFLOP/s without sparsity and TB/s of NVIDIA's data sheets, by the device's name. Another chip gets no limits.
CHIPS = {
    "NVIDIA H100 80GB HBM3": {"fp8": 1979, "bf16": 989, "tb_per_s": 3.35},  # SXM
    "NVIDIA H100 PCIe": {"fp8": 1513, "bf16": 756, "tb_per_s": 2.0},
    "NVIDIA H100 NVL": {"fp8": 1671, "bf16": 835, "tb_per_s": 3.9},
    "NVIDIA H200": {"fp8": 1979, "bf16": 989, "tb_per_s": 4.8},
    "NVIDIA H200 NVL": {"fp8": 1671, "bf16": 835, "tb_per_s": 4.8},
    "NVIDIA H800": {"fp8": 1979, "bf16": 989, "tb_per_s": 3.35},
    "NVIDIA H20": {"fp8": 296, "bf16": 148, "tb_per_s": 4.0},
}


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
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


def milliseconds(run: Any, repeats: int, *, other: Any) -> float:
    """The median time of `repeats` launches that find `other` in the L2 cache."""
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(WAIT * repeats)
    for start, end in events:
        other.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def timed(case: Any, *, rounds: int, repeats: int, chip: dict[str, float] | None, other: Any) -> dict[str, Any]:
    """All contenders of a case, round by round."""
    contenders = {f"ours {setting}" if setting else "ours": lambda s=setting: case.run(s) for setting in case.settings}
    contenders |= case.peers
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            times[name].append(milliseconds(run, repeats, other=other))
    out = {}
    for name, (_, *spread) in times.items():  # the first warms up
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
    return {"error": max(errors), "limit": case.limit, "correct": all(error <= case.limit for error in errors)}


def compiled(shapes: list[str], only: str) -> list[dict[str, Any]]:
    """The kernels at the true shapes, compiled for Hopper without one: tensors without memory, nothing launched."""
    import kernel_cases
    from kernel_compiler import compiling

    with compiling() as found:
        for shape in shapes:
            for case in kernel_cases.cases(kernel_cases.SHAPES[shape], "meta"):
                labelled(found, f"{shape}: operands of {case.name}")  # which were quantised on the way here
                for setting in case.settings if only in case.name else ():
                    case.run(setting)
                    labelled(found, f"{shape}: {case.name}", str(setting or ""))
    return found


def labelled(kernels: list[dict[str, Any]], case: str, setting: str = "") -> None:
    """Says of the kernels that are new what they were compiled for."""
    for kernel in kernels:
        kernel.setdefault("case", case)
        kernel.setdefault("setting", setting)


def measured(
    given: argparse.Namespace, shapes: list[Any], *, device: str, chip: dict[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """Every kernel checked, and on a GPU timed. One that fails does not stop the others."""
    import kernel_cases
    import torch
    from triton.runtime.errors import TritonError

    other = torch.empty(FLUSHED if device == "cuda" else 0, dtype=torch.uint8, device=device)
    for shape in shapes:
        for case in kernel_cases.cases(shape, device):
            if given.only not in case.name:
                continue
            row: dict[str, Any] = {"shape": shape.name, "kernel": case.name}
            try:
                row |= checked(case, case.settings[:1] if given.interpret else case.settings)
                if device == "cuda":
                    how = {"rounds": given.rounds, "repeats": given.repeats}
                    row["contenders"] = timed(case, **how, chip=chip, other=other)
            except (RuntimeError, TritonError) as error:
                row |= {"failed": f"{type(error).__name__}: {error}", "correct": False}
            print(json.dumps(row), file=sys.stderr)
            yield row


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The JSON's content."""
    missing = [name for name in ("torch", "triton") if not importlib.util.find_spec(name)]
    if missing:
        return {"status": f"not run: {' and '.join(missing)} not installed"}
    os.environ["TRITON_INTERPRET"] = str(int(given.interpret))  # whatever it was: an interpreter's times mean nothing
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    import torch

    result = provenance()
    if given.compile:
        kernels = compiled(given.shapes, given.only)
        return result | {"status": "compiled for sm_90; not run", "kernels": kernels}
    import kernel_cases

    if given.interpret:
        from erniekit.ops.triton.interpreter import put_right

        put_right()
        kernels = list(measured(given, [kernel_cases.TINY], device="cpu"))
        return result | {"status": "correctness in Triton's interpreter; speed not run", "kernels": kernels}
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return result | {"status": "not run: torch sees no Hopper GPU"}
    result |= {
        "status": "run", "chip": CHIPS.get(torch.cuda.get_device_name()), "rounds": given.rounds,
        "repeats": given.repeats, "flushed": FLUSHED,
    }  # fmt: skip
    shapes = [kernel_cases.SHAPES[name] for name in given.shapes]
    return result | {"kernels": list(measured(given, shapes, device="cuda", chip=result["chip"]))}


def main() -> int:
    """Print the JSON; the exit code says whether every kernel was right."""
    given = options()
    result = measure(given)
    if not result.get("kernels", True):
        sys.exit(f"no kernel has {given.only!r} in its name")
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(not row.get("correct", True) for row in result.get("kernels", ())))


if __name__ == "__main__":
    sys.exit(main())
