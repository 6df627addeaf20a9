"""Hugging Face weight files: a bounds-checked mmap reader and a streaming, atomic writer of safetensors, and the index.

The library's own numpy functions cannot read bfloat16, hold a whole file in memory when writing, and corrupt arrays
that are not contiguous. Knows nothing of ERNIE: names, shapes, formats and bytes only.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from erniekit.base.errors import CheckpointError, listed
from erniekit.base.files import atomic_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# In the order in which the safetensors library sorts formats (it writes the last first, so that all data is aligned).
FORMATS: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16), "F16": np.dtype(np.float16), "BF16": BFLOAT16, "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32), "F32": np.dtype(np.float32), "F64": np.dtype(np.float64), "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}  # fmt: skip
_RANK = {tag: rank for rank, tag in enumerate(FORMATS)}
_MAX_HEADER_BYTES = 100_000_000


def format_tag(dtype: np.dtype) -> str:
    """The safetensors name of a numpy format."""
    return next(tag for tag, known in FORMATS.items() if known == dtype)


# ---------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Stored:
    """One tensor of a file: format tag, shape, and its range of bytes counted from the start of the file."""

    tag: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An opened safetensors file: its header is checked on opening, its data read lazily as views of the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            header, data_start = self._header(file.read(8), file)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, Stored] = {name: self._entry(name, entry, data_start) for name, entry in header.items()}
        self._check_ranges(data_start)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor's bytes in the file."""
        stored = self.tensors[name]
        count = math.prod(stored.shape)
        return np.frombuffer(self._map, FORMATS[stored.tag], count, stored.start).reshape(stored.shape)

    def release(self, name: str) -> None:
        """Tell the system that these pages are no longer needed, so that streaming a file keeps no file in memory."""
        stored = self.tensors[name]
        start = stored.start - stored.start % mmap.PAGESIZE
        if hasattr(self._map, "madvise") and stored.stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stored.stop - start)

    def _fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text} Copy or download the file again.")

    def _header(self, prefix: bytes, file: Any) -> tuple[dict[str, Any], int]:
        if len(prefix) < 8:
            raise self._fail(f"is not a safetensors file: {self.num_bytes} bytes, too short for a header.")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(self.num_bytes - 8, _MAX_HEADER_BYTES):
            raise self._fail(
                f"is not a whole safetensors file: its header claims {length} bytes, and the file has {self.num_bytes}."
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"its safetensors header is not valid JSON ({error}).") from error
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
            raise self._fail("its safetensors header is not a table of tensors.")
        return header, 8 + length

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise self._fail(f"its header names {', '.join(repr(name) for name in listed(twice))} more than once.")
        return dict(pairs)

    def _entry(self, name: str, entry: Any, data_start: int) -> Stored:
        fields = entry if isinstance(entry, dict) else {}
        tag, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2 and isinstance(tag, str)):
            raise self._fail(f"tensor '{name}': its header entry {entry!r} is not understood.")
        if tag not in FORMATS:
            raise self._fail(f"tensor '{name}' has format '{tag}'; {', '.join(FORMATS)} are known.")
        start, stop = offsets
        if stop - start != math.prod(shape) * FORMATS[tag].itemsize:
            raise self._fail(f"tensor '{name}': {stop - start} bytes do not make shape {shape} of {tag}.")
        return Stored(tag, tuple(shape), data_start + start, data_start + stop)

    def _check_ranges(self, data_start: int) -> None:
        end = data_start
        for name, stored in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if stored.start != end:
                word = "overlaps the tensor before it" if stored.start < end else "leaves a hole before it"
                raise self._fail(f"tensor '{name}' {word} (bytes {stored.start} to {stored.stop}).")
            end = stored.stop
        if end > self.num_bytes:
            raise self._fail(f"is truncated: its tensors need {end} bytes, and the file has {self.num_bytes}.")
        if end < self.num_bytes:
            raise self._fail(f"holds {self.num_bytes - end} bytes after its last tensor.")


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def is_weight_file(name: str) -> bool:
    """Whether a file holds model weights, by its name; optimizer states and adapters have others."""
    return name == SINGLE_FILE or _SHARD.fullmatch(name) is not None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors weight files of a folder."""
    return sorted(path for path in folder.glob("model*.safetensors") if is_weight_file(path.name))


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """All weight files of `folder` by name, checked against the index; empty if there are none."""
    files, index_path = weight_files(folder), folder / INDEX_FILE
    indexed = _read_index(index_path) if index_path.is_file() else None
    present = {path.name for path in files}
    problems: list[str] = []
    if indexed is not None:
        wanted = set(indexed.values())
        problems += [f"{folder}: {name} is named in {INDEX_FILE} and missing." for name in sorted(wanted - present)]
        problems += [f"{folder}: {name} is not named in {INDEX_FILE}." for name in sorted(present - wanted)]
    elif len(files) > 1 or (files and files[0].name != SINGLE_FILE):
        problems.append(f"{folder}: {INDEX_FILE} is missing beside {', '.join(listed(sorted(present), limit=3))}.")
    opened = {}
    for path in files:
        try:
            opened[path.name] = SafetensorsFile(path)
        except CheckpointError as error:
            problems += error.problems
    if indexed is not None and opened.keys() == present:
        problems += _index_problems(folder, indexed, opened)
    holders = Counter(name for file in opened.values() for name in file.tensors)
    problems += [f"{folder}: tensor '{name}' lies in several shards." for name, count in holders.items() if count > 1]
    if problems:
        raise CheckpointError(listed(problems))
    return opened


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        valid = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path}: not an index (an object with a 'weight_map' of tensor names to file names).")
    return weight_map


def _index_problems(folder: Path, indexed: Mapping[str, str], opened: Mapping[str, SafetensorsFile]) -> list[str]:
    absent = [
        f"{folder}: {INDEX_FILE} says that {file} holds tensor '{name}'; it does not."
        for name, file in indexed.items()
        if file in opened and name not in opened[file].tensors
    ]
    unnamed = [
        f"{folder}: {file} holds tensor '{name}', which {INDEX_FILE} does not place there."
        for file, shard in opened.items()
        for name in shard.tensors
        if indexed.get(name) != file
    ]
    return absent + unnamed


# ---------------------------------------------------------------------- writing
@dataclass(frozen=True)
class Entry:
    """A tensor to be written: name, format tag ("U16" is Paddle's name for bfloat16 bits), shape."""

    name: str
    tag: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * FORMATS[self.tag].itemsize


def plan_shards(entries: list[Entry], *, max_shard_bytes: int) -> dict[str, list[Entry]]:
    """Distribute tensors over files, in order, none above `max_shard_bytes` unless one tensor alone is."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(
    path: str | Path, entries: list[Entry], *, arrays: Callable[[list[Entry]], Iterator[np.ndarray]],
    metadata: dict[str, str],
) -> str:  # fmt: skip
    """Write a file tensor after tensor and return its sha256.

    `arrays` is called with the entries in file order and yields their arrays, one at a time in memory. The file appears
    under its name only when it is whole and on disk.
    """
    ordered = in_file_order(entries)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        header = _header_bytes(ordered, metadata)
        digest.update(header)
        file.write(header)
        for entry, array in zip(ordered, arrays(ordered), strict=True):
            assert array.shape == entry.shape and array.itemsize == FORMATS[entry.tag].itemsize, entry
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def create_safetensors(path: str | Path, entries: list[Entry], *, metadata: dict[str, str]) -> None:
    """A file of full size without its numbers, which several processes write into it (`SharedFile`).

    Its room on the disk is taken at once: a write through a map to a full disk would kill the process.
    """
    ordered = in_file_order(entries)
    header = _header_bytes(ordered, metadata)
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        if num_bytes := sum(entry.num_bytes for entry in ordered):
            os.posix_fallocate(file.fileno(), len(header), num_bytes)
        os.fsync(file.fileno())


class SharedFile:
    """A created safetensors file, open for writing at any place."""

    def __init__(self, path: Path) -> None:
        self._tensors = SafetensorsFile(path).tensors
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def array(self, name: str) -> np.ndarray:
        """The tensor's place in the file, to write into; bfloat16 whatever its tag says."""
        stored = self._tensors[name]
        dtype = BFLOAT16 if stored.tag == "U16" else FORMATS[stored.tag]
        return np.frombuffer(self._map, dtype, math.prod(stored.shape), stored.start).reshape(stored.shape)

    def release(self, name: str) -> None:
        """Let the system keep the tensor's pages to itself; what was written there is not lost."""
        stored = self._tensors[name]
        start = stored.start - stored.start % mmap.PAGESIZE
        if hasattr(self._map, "madvise") and stored.stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stored.stop - start)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._map.flush()


def in_file_order(entries: list[Entry]) -> list[Entry]:
    """As the safetensors library orders them: the widest formats first, then by name."""
    return sorted(entries, key=lambda entry: (-_RANK[entry.tag], entry.name))


def _header_bytes(ordered: list[Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": entry.tag, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def index_content(shards: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """The content of the index file."""
    total = sum(entry.num_bytes for entries in shards.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
