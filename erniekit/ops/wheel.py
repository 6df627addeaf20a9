"""The libraries of the Paddle wheel that kernels borrow: oneDNN for matrix products, Intel's OpenMP for threads.

Wheels for other systems may lack them: what can do without gets None.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from erniekit.base import runtime

_PADDLE = importlib.util.find_spec("paddle")  # its place, without loading it: numpy's threads serve those who never do
LIBRARIES = Path(_PADDLE.origin if _PADDLE and _PADDLE.origin else "paddle/__init__.py").parent / "libs"
OPENMP, ONEDNN = "libiomp5.so", "libdnnl.so"
SGEMM, BF16_GEMM = "dnnl_sgemm", "dnnl_gemm_bf16bf16f32"

_CHAR, _SIZE, _FLOAT, _POINTER = ctypes.c_char, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def wheel_library(name: str) -> Path:
    """Where the wheel keeps a library. Raises OSError if it has none of that name."""
    found = sorted(LIBRARIES.glob(name + "*"))
    if not found:
        raise OSError(f"this Paddle wheel has no {name} in {LIBRARIES}")
    return found[0]


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """The threads of oneDNN and MKL: omp_get_max_threads, omp_set_num_threads."""
    try:
        return ctypes.CDLL(str(wheel_library(OPENMP)))
    except OSError:
        return None


@functools.cache
def product(name: str) -> ctypes._NamedFuncPointer | None:
    """oneDNN's SGEMM or BF16_GEMM (a and b in bf16, sums in fp32): row-major out = alpha * op(a) op(b) + beta * out."""
    try:
        function = getattr(ctypes.CDLL(str(wheel_library(ONEDNN))), name)
    except (OSError, AttributeError):
        return None
    matrix = (_POINTER, _SIZE)
    function.argtypes = (_CHAR, _CHAR, _SIZE, _SIZE, _SIZE, _FLOAT, *matrix, *matrix, _FLOAT, *matrix)
    function.restype = ctypes.c_int
    return function


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices by instructions of its own."""
    flags = runtime.cpu_flags().split()
    return ("avx512_bf16" in flags or "amx_bf16" in flags) and product(BF16_GEMM) is not None
