"""The compiled kernels of `ops/csrc`: built once per machine, loaded with ctypes, absent without a compiler.

The kernels call two libraries of the Paddle wheel: oneDNN for matrix products and Intel's OpenMP for threads, so that
ours and MKL's are the same threads. Whatever is missing, the answer is one notice and the plain twins.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TypeAlias

import paddle

from erniekit.base import runtime
from erniekit.base.console import notice

SOURCES = Path(__file__).parents[1] / "csrc"
WHEEL_LIBRARIES = Path(paddle.__file__).parent / "libs"
OPENMP, ONEDNN = "libiomp5.so", "libdnnl.so"
# No -ffast-math: it would flush subnormals in the whole process and drop NaN.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    "-fvisibility=hidden",
)  # fmt: skip

Argument: TypeAlias = "paddle.Tensor | int | float | None"


def call(name: str, *arguments: Argument) -> int:
    """Run one kernel and return its result, where it has one.

    Tensors pass as pointers, None as null, int as int64, float as fp32. Tensors must be contiguous: kernels see no
    strides.
    """
    kernels = library()
    assert kernels is not None, "only ops/dispatch.py lets a tensor come here, and it asks first"
    kernel = getattr(kernels, name)
    kernel.restype = ctypes.c_int64
    return kernel(*map(_argument, arguments))


def _argument(value: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    assert value.is_contiguous(), f"a kernel got a strided tensor: shape {value.shape}, strides {value.strides}"
    return ctypes.c_void_p(value.data_ptr())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None (after one notice) if this machine cannot have them."""
    try:
        path = compiled_path()
        if not path.exists():
            _compile(path)
        kernels = ctypes.CDLL(str(path))
        sgemm = ctypes.CDLL(str(_wheel_library(ONEDNN))).dnnl_sgemm
        kernels.set_up(ctypes.cast(sgemm, ctypes.c_void_p), ctypes.c_int(runtime.num_threads()))
        return kernels
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = " ".join(said.split())[:300]
        notice(f"the fast CPU kernels are off, training takes about four times as long: {reason}")
        return None


def compiled_path() -> Path:
    """Where the compiled kernels belong: a file in the cache folder, named by everything that shapes them."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    rest = (*FLAGS, str(_wheel_library(OPENMP)), platform.machine(), runtime.cpu_flags())
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
        _run(compiler, "-shared", "-Wl,--no-undefined", unit, _wheel_library(OPENMP), "-lm", "-o", made)
        made.replace(path)  # whole or not at all, whoever else compiles at the same time


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _wheel_library(name: str) -> Path:
    found = sorted(WHEEL_LIBRARIES.glob(name + "*"))
    if not found:
        raise OSError(f"this Paddle wheel has no {name} in {WHEEL_LIBRARIES}")
    return found[0]
