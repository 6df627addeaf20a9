"""Compiling Triton's kernels for Hopper on a machine without one, for bench_kernels.py: launches become compilations,
and what the compiler made is read off. The assembler (ptxas) comes with Triton."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WGMMA = {"fp8": r"wgmma\.mma_async\S*\.e[45]m[32]\.e[45]m[32]", "bf16": r"wgmma\.mma_async\S*\.bf16\.bf16"}


class _Hopper(CudaDriver):
    """A driver that knows which chip is meant, and has none."""

    def __init__(self) -> None:
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack and local memory (spills), as the assembler says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)
    return {name.lower(): int(number) for name, number in found}


def _described(name: str, kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    matrix = {kind: len(re.findall(pattern, ptx)) for kind, pattern in WGMMA.items()}
    return {
        "kernel": name, "shared": kernel.metadata.shared, "wgmma": {kind: n for kind, n in matrix.items() if n},
        "slower_mma": ptx.count("mma.sync"),
    } | _resources(kernel.asm["cubin"])  # fmt: skip


@contextlib.contextmanager
def compiling() -> Iterator[list[dict[str, Any]]]:
    """In here a launch compiles for Hopper and adds to the list."""
    found: list[dict[str, Any]] = []
    run, before, seen = JITFunction.run, driver._active, set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(_described(self.fn.__name__, kernel))
        return kernel

    driver.set_active(_Hopper())
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver.set_active(before)
