"""The compiled kernels of `ops/csrc`: built once per machine, loaded with ctypes, absent without a compiler.

The kernels call two libraries of the Paddle wheel: oneDNN for matrix products and Intel's OpenMP for threads, so that
ours and MKL's are the same threads. Whatever is missing, the answer is one notice and the plain twins.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import paddle

from erniekit.base import runtime
from erniekit.base.console import notice

SOURCES = Path(__file__).parents[1] / "csrc"
WHEEL_LIBRARIES = Path(paddle.__file__).parent / "libs"
# No -ffast-math: it would flush subnormals in the whole process and drop NaN.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden")

Argument = paddle.Tensor | int | float | None


class Library:
    """Calls kernels by name: tensors pass as pointers, None as null, int as int64 and float as fp32."""

    def __init__(self, path: Path) -> None:
        self._kernels = ctypes.CDLL(str(path))
        sgemm = ctypes.cast(ctypes.CDLL(str(_wheel_library("libdnnl.so"))).dnnl_sgemm, ctypes.c_void_p)
        self._kernels.set_up(sgemm, ctypes.c_int(runtime.num_threads()))

    def call(self, name: str, *arguments: Argument) -> int:
        """Run one kernel. Tensors must be contiguous: kernels see no strides."""
        kernel = getattr(self._kernels, name)
        kernel.restype = ctypes.c_int64
        return kernel(*map(_argument, arguments))


def _argument(value: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float | None:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    assert value.is_contiguous(), f"a kernel got a strided tensor: shape {value.shape}, strides {value.strides}"
    return ctypes.c_void_p(value.data_ptr())


@functools.cache
def library() -> Library | None:
    """The kernels, compiled if need be; None (after one notice) if this machine cannot have them."""
    try:
        return Library(_compiled())
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        notice(f"the fast CPU kernels are off, training takes about twice as long: {reason}")
        return None


def _compiled() -> Path:
    """The shared library in the cache folder, named by everything that shaped it."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise OSError("g++ was not found; install it (for example: apt install g++)")
    openmp = _wheel_library("libiomp5.so")
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    made_of = [*sources, *map(str.encode, (*FLAGS, compiler, str(openmp), platform.machine(), runtime.cpu_flags()))]
    path = Path(runtime.cache_folder()) / f"kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unit, made = Path(folder) / "library.o", Path(folder) / "library.so"
            # Two commands: linked with -fopenmp, the library would bring GNU's OpenMP as a second pool of threads.
            _run([compiler, *FLAGS, "-c", str(SOURCES / "library.cpp"), "-o", str(unit)])
            _run([compiler, "-shared", "-Wl,--no-undefined", str(unit), str(openmp), "-lm", "-o", str(made)])
            os.replace(made, path)  # whole or not at all, whoever else compiles at the same time
    return path


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _wheel_library(name: str) -> Path:
    found = sorted(WHEEL_LIBRARIES.glob(name + "*"))
    if not found:
        raise OSError(f"this Paddle wheel has no {name} in {WHEEL_LIBRARIES}")
    return found[0]
