"""The kernels behind the PyLayers of this folder: `ops/csrc`, compiled once per machine, or `ops/arrays` in numpy.

Compiled kernels call two libraries of the Paddle wheel: oneDNN for matrix products and Intel's OpenMP for threads, so
that ours and MKL's are the same threads. Whatever is missing, the answer is one notice and the kernels in numpy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import paddle

from erniekit.base import runtime
from erniekit.base.console import notice
from erniekit.ops.arrays import (
    attention,
    ccq,
    cross_entropy,
    dense,
    experts,
    float8_casts,
    hadamard,
    low_rank,
    optimizer,
    packed,
)
from erniekit.ops.arrays.threads import product_threads
from erniekit.ops.wheel import BF16_GEMM, ONEDNN, OPENMP, SGEMM, product, wheel_library

SOURCES = Path(__file__).parents[1] / "csrc"
# No -ffast-math: it would flush subnormals in the whole process and drop NaN.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    "-fvisibility=hidden",
)  # fmt: skip

_NUMPY_MODULES = (
    attention, ccq, cross_entropy, dense, experts, float8_casts, hadamard, low_rank, optimizer, packed,
)  # fmt: skip
_NUMPY_TYPES = {
    paddle.float32: "<f4", paddle.int64: "<i8", paddle.int32: "<i4", paddle.bool: "|b1",
    paddle.int8: "|i1", paddle.uint8: "|u1",
    paddle.bfloat16: "<u2",  # as bits: numpy has no such numbers
}  # fmt: skip

Argument: TypeAlias = "paddle.Tensor | np.ndarray | int | float | None"


def call(name: str, *arguments: Argument) -> int:
    """Run one kernel and return its result; it means nothing where the kernel returns none.

    To a compiled kernel tensors and arrays pass as pointers, None as null, int as int64, float as fp32; to one in numpy
    tensors pass as arrays of the same memory. Both must be contiguous: compiled kernels see no strides.
    """
    compiled = None if runtime.numpy_ops() else library()
    if compiled is None:
        with product_threads(runtime.num_threads()):
            return numpy_kernel(name)(*map(_array, arguments)) or 0
    kernel = getattr(compiled, name)
    kernel.restype = ctypes.c_int64
    return kernel(*map(_argument, arguments))


def tier() -> Literal["cpp", "numpy"]:
    """Which kernels `call` runs."""
    return "numpy" if runtime.numpy_ops() or library() is None else "cpp"


@functools.cache
def numpy_kernel(name: str) -> Callable[..., int | None]:
    """The kernel of `ops/arrays` that has this name."""
    return next(vars(module)[name] for module in _NUMPY_MODULES if name in vars(module))


def _argument(value: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous, f"a kernel got a strided array: shape {value.shape}, strides {value.strides}"
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(_address(value))


def _address(tensor: paddle.Tensor) -> int:
    # Paddle says of a tensor without numbers that it is not contiguous.
    good = tensor.is_contiguous() or not tensor.size
    assert good, f"a kernel got a strided tensor: shape {tensor.shape}, strides {tensor.strides}"
    return tensor.data_ptr()


class _Memory:
    """A tensor's memory as numpy wants it described."""

    def __init__(self, tensor: paddle.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3, "shape": tuple(tensor.shape), "typestr": _NUMPY_TYPES[tensor.dtype],
            "data": (_address(tensor), False),
        }  # fmt: skip
        self._tensor = tensor  # lives as long as the array


def _array(value: Argument) -> np.ndarray | int | float | None:
    if not isinstance(value, paddle.Tensor):
        return value
    if not value.size:  # no memory at all: numpy before 2.3 refuses a null address
        return np.empty(value.shape, _NUMPY_TYPES[value.dtype])
    return np.asarray(_Memory(value))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None (after one notice) if this machine cannot have them."""
    try:
        path = compiled_path()
        if not path.exists():
            _compile(path)
        kernels = ctypes.CDLL(str(path))
        sgemm, bf16_gemm = product(SGEMM), product(BF16_GEMM)
        if sgemm is None:
            raise OSError(f"{ONEDNN} of this Paddle wheel has no {SGEMM}")
        products = [ctypes.cast(found, ctypes.c_void_p) if found else None for found in (sgemm, bf16_gemm)]
        kernels.set_up(*products, ctypes.c_int(runtime.num_threads()))
        return kernels
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = " ".join(said.split())[:300]
        notice(f"no compiled CPU kernels, training takes about 1.3 times as long with those in numpy: {reason}")
        return None


def compiled_path() -> Path:
    """Where the compiled kernels belong: a file in the cache folder, named by everything that shapes them."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    rest = (*FLAGS, str(wheel_library(OPENMP)), platform.machine(), runtime.cpu_flags())
    key = hashlib.sha256(b"|".join([*sources, *map(str.encode, rest)])).hexdigest()[:16]
    return Path(runtime.cache_folder()) / f"kernels-{key}.so"


def _compile(path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise OSError("g++ was not found; install it (for example: apt install g++)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit, made = Path(folder) / "library.o", Path(folder) / "library.so"
        # Two commands: linked with -fopenmp, the library would bring GNU's OpenMP as a second pool of threads.
        _run(compiler, *FLAGS, "-c", SOURCES / "library.cpp", "-o", unit)
        _run(compiler, "-shared", "-Wl,--no-undefined", unit, wheel_library(OPENMP), "-lm", "-o", made)
        made.replace(path)  # whole or not at all, whoever else compiles at the same time


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
