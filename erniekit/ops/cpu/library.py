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

Argument = paddle.Tensor | int | float | None


class Library:
    """Calls kernels by name: tensors pass as pointers, None as null, int as int64 and float as fp32."""

    def __init__(self, path: Path) -> None:
        self._kernels = ctypes.CDLL(str(path))
        sgemm = ctypes.cast(ctypes.CDLL(str(_wheel_library(ONEDNN))).dnnl_sgemm, ctypes.c_void_p)
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
        path = compiled_path()
        if not path.exists():
            _compile(path)
        return Library(path)
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        notice(f"the fast CPU kernels are off, training takes about twice as long: {reason}")
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
        for command in (
            [compiler, *FLAGS, "-c", SOURCES / "library.cpp", "-o", unit],
            [compiler, "-shared", "-Wl,--no-undefined", unit, _wheel_library(OPENMP), "-lm", "-o", made],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(path)  # whole or not at all, whoever else compiles at the same time


def _wheel_library(name: str) -> Path:
    found = sorted(WHEEL_LIBRARIES.glob(name + "*"))
    if not found:
        raise OSError(f"this Paddle wheel has no {name} in {WHEEL_LIBRARIES}")
    return found[0]
