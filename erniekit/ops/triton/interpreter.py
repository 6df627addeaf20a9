"""Triton's interpreter, put right where it is wrong, for tests and for `scripts/bench_kernels.py --interpret`. To be
imported after Triton has been imported with TRITON_INTERPRET=1; never on a GPU.

What was found in Triton 3.9: casts from fp32 to bf16 cut the lower bits off, and to FP8 round to even only sometimes
(2 % of normal numbers differ), so the kernels round by bits themselves; the FP8 codes of NaN decode as numbers, which
they never read; and a product of bf16 multiplies their bit patterns as integers, which is put right here. Sums of
products are in fp32 here, in numpy's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def _numbers(handle: Any) -> np.ndarray:
    """What an operand of a product means, in fp32."""
    bits, kind = handle.data, handle.dtype.scalar
    if kind == tl.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind in (tl.float8e4nv, tl.float8e5):
        mantissa, bias = (3, 7) if kind == tl.float8e4nv else (2, 15)
        magnitude = (bits & 0x7F).astype(np.uint32) << (23 - mantissa)
        value = magnitude.view(np.float32) * np.float32(2.0 ** (127 - bias))  # subnormal numbers come right, too
        return np.where(bits & 0x80, -value, value)
    return bits.astype(np.float32)


def _dot(_builder: Any, a: Any, b: Any, start: Any, *_precision: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(_numbers(a), _numbers(b)) + start.data, start.dtype.scalar)


def _as_they_are(_executor: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def _nothing(_executor: Any, *_args: Any) -> None:
    return None


def put_right() -> None:
    """Products of bf16 and FP8 as numbers; and tensors of any framework as arguments, which are in reach of the
    interpreter already and need no copy on the host."""
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.GridExecutor._init_args_hst = _as_they_are
    interpreter.GridExecutor._restore_args_dev = _nothing
