"""Reads a .pdparams file (a pickle by paddle.save of a plain state dict) without executing anything in it.

A pickle is a program. This reader lets it call only stand-ins of our own that record what paddle.save writes (numpy
arrays, their dtypes, strings, tuples); every other global is refused by name, before it is imported. Array sizes are
checked here, so no untrusted value reaches numpy's unpickling code either.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from erniekit.base.errors import CheckpointError

# paddle.save adds this table of parameter names beside the tensors.
_NAME_TABLE = "StructuredToParameterName@@"
# What unpickling damaged bytes raises besides its own error.
_BROKEN = (ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError, MemoryError, struct.error)
_FORMATS: dict[str, np.dtype] = {"f4": np.dtype("<f4"), "u2": np.dtype("<u2")}


class _Refused(Exception):
    """The pickle asks for something that a state dict does not contain."""


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            raise _Refused("a big-endian array")


class _Array:
    """Stands in for numpy.ndarray: records, and builds the array after checking sizes."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code not in _FORMATS:
            code = getattr(dtype, "code", dtype)
            raise _Refused(f"an array of format '{code}' (float32, and bfloat16 as uint16, are known)")
        if not isinstance(data, bytes):
            raise _Refused("an array whose content is not plain bytes")
        known = _FORMATS[dtype.code]
        if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * known.itemsize != len(data):
            raise _Refused(f"an array whose {len(data)} bytes do not make shape {shape}")
        array = np.frombuffer(data, known)
        self.value = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _latin1(text: Any, encoding: Any) -> bytes:
    """Stands in for codecs.encode, by which old pickles carry bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("a text encoded in an unexpected way")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    ("builtins", "tuple"): tuple,
    ("collections", "OrderedDict"): dict,
}


class _Bounded:
    """A file that refuses to be asked for more than it holds, before memory for the answer is taken."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.readline, self._size = file, file.readline, os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.read(count)


class _Reader(pickle._Unpickler):  # in Python: the one in C takes whatever memory a damaged file names
    # Protocol 5, which paddle.save does not write, reserves memory for byte arrays before it reads them.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get((module, name))
        if found is None:
            raise _Refused(f"'{module}.{name}', which a plain state dict never needs and which could execute code")
        return found

    def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002 (the base class's signature)
        raise _Refused("a reference to something outside the file")


def read_pdparams(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict saved by paddle.save: float32, and uint16 holding bfloat16 bits."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            state = _Reader(_Bounded(file)).load()
    except _Refused as refused:
        raise CheckpointError(
            f"{path}: refused: it contains {refused}. Only tensors saved by paddle.save(model.state_dict(), ...) are "
            "read; nothing in the file was executed."
        ) from refused
    except (pickle.UnpicklingError, EOFError, *_BROKEN) as error:
        raise CheckpointError(f"{path}: not a whole .pdparams file ({error}). Copy or download it again.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict.")
    return {name: _tensor(path, name, value) for name, value in state.items() if name != _NAME_TABLE}


def _tensor(path: Path, name: Any, value: Any) -> np.ndarray:
    if isinstance(value, tuple) and len(value) == 2:  # (the parameter's own name, array)
        value = value[1]
    if not isinstance(name, str) or not isinstance(value, _Array) or not hasattr(value, "value"):
        raise CheckpointError(f"{path}: entry {name!r} is not a tensor.")
    return value.value
