"""Writes a quantised folder: a weight at a time, into files laid out beforehand, with a journal that a killed export
goes on from.

Nothing is ever in memory but one weight in fp32, its codes, and what they stand for. A file is made in its full size
first (a full disk shows at once) and filled through a map; every few seconds it is brought to the disk and then the
journal says which weights it has. What a kill leaves lies in the hidden folder inside the target; the same command goes
on there and makes the same bytes. Another command, or an error, leaves nothing of it. The folder appears as any other:
config.json last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError
from erniekit.base.files import sha256, write_json
from erniekit.checkpoint.ernie45 import Table, Tensor, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE, Entry, SharedFile, create_safetensors, index_content
from erniekit.checkpoint.journal import Journal, resumable
from erniekit.checkpoint.quantised import CACHE_SCALES, QUANTIZATION, Scheme, input_scale, stored_name
from erniekit.checkpoint.quantised_folder import layout_fields
from erniekit.checkpoint.save import METADATA, REPORT_FILE, copy_companions, finish, publish
from erniekit.checkpoint.source import Source, fill, made
from erniekit.ops.arrays.threads import sum_rows
from erniekit.precision.encoders import ACTIVATION_SCALE, Encoder
from erniekit.precision.quantize import require_finite

_STATISTICS = ".statistics.npz"  # hidden: neither the manifest nor the folder gets it
_SECONDS = 5.0  # of work that a kill may cost
_ROWS = 4096

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what was done last


@dataclass(frozen=True)
class Statistics:
    """What was seen of a model's inputs over some tokens, by names in -Paddle layout."""

    tokens: int = 0
    largest: Mapping[str, float] = field(default_factory=dict)  # of all numbers that go into a weight
    squares: Mapping[str, np.ndarray] = field(default_factory=dict)  # mean square of each input of a weight
    cache: Mapping[str, np.ndarray] = field(default_factory=dict)  # largest of each channel, by the scale's name

    def write(self, path: Path) -> None:
        """Keep it for an export that goes on."""
        arrays = {"tokens": np.array(self.tokens)}
        arrays |= {f"largest {name}": np.array(value) for name, value in self.largest.items()}
        arrays |= {f"squares {name}": value for name, value in self.squares.items()}
        arrays |= {f"cache {name}": value for name, value in self.cache.items()}
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """What `write` kept."""
        with np.load(path) as kept:
            of = {name: kept[name] for name in kept.files}

        def named(kind: str) -> dict[str, np.ndarray]:
            return {name.partition(" ")[2]: value for name, value in of.items() if name.startswith(kind + " ")}

        largest = {name: float(value) for name, value in named("largest").items()}
        return cls(int(of["tokens"]), largest, named("squares"), named("cache"))


@dataclass(frozen=True)
class Made:
    """A quantised folder that was written: its report, and how many bytes of weights were read."""

    report: dict[str, Any]
    num_bytes: int


# ---------------------------------------------------------------------- what is written where
@dataclass(frozen=True)
class _Plan:
    table: Table
    fields: dict[str, dict[str, tuple[str, tuple[int, ...]]]]
    files: dict[str, dict[str, list[Entry]]]  # file -> tensor -> what is stored of it

    @classmethod
    def new(cls, folder: Folder, scheme: Scheme, *, max_shard_bytes: int) -> _Plan:
        cfg = folder.disk_config
        table = layout_table(cfg, "paddle", folder.form.in_layout(cfg, "paddle"))
        scheme.check({name: tensor.shape for name, tensor in table.tensors.items()})
        fields = layout_fields(table, scheme, cfg)
        shards: list[dict[str, list[Entry]]] = [{}]
        used = 0
        for name, tensor in table.tensors.items():
            stored = fields.get(name, {name: (_tag(folder, table, tensor), tensor.shape)})
            entries = [Entry(part, tag, shape) for part, (tag, shape) in stored.items()]
            size = sum(entry.num_bytes for entry in entries)
            if shards[-1] and used + size > max_shard_bytes:
                shards.append({})
                used = 0
            shards[-1][name] = entries
            used += size
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        return cls(table, fields, dict(zip(names if count > 1 else [SINGLE_FILE], shards, strict=True)))

    def entries(self) -> dict[str, list[Entry]]:
        """All that is stored, by file."""
        return {file: [entry for part in parts.values() for entry in part] for file, parts in self.files.items()}


def _tag(folder: Folder, table: Table, tensor: Tensor) -> str:
    """The format of a tensor that stays: as precise as its most precise part."""
    atoms = [atom for atom, _ in tensor.parts]
    exact = any(folder.tag(folder.table.places[atom].tensor) == "F32" or table.atoms[atom].fp32 for atom in atoms)
    return "F32" if exact else "U16"


# ---------------------------------------------------------------------- the work
def write_quantised(
    target: Path, folder: Folder, scheme: Scheme, *, source: Source, statistics: Callable[[], Statistics],
    identity: Mapping[str, Any], max_shard_bytes: int, progress: Progress, every: float = _SECONDS,
) -> Made:  # fmt: skip
    """Write the atoms of `source` into `target` as `scheme` says; all else as `folder` has it.

    `statistics` is asked once, also by an export that goes on; `identity` tells one export from another: what is read,
    and what it is calibrated with. Raises CheckpointError naming the weight that holds NaN or infinity.
    """
    plan = _Plan.new(folder, scheme, max_shard_bytes=max_shard_bytes)
    settings = scheme.settings()
    facts = {**identity, "settings": settings, "files": {f: list(parts) for f, parts in plan.files.items()}}
    export = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    with resumable(target, export) as (stage, journal):
        if journal.goes_on:
            notice(f"{target}: going on with an export that was interrupted; {len(journal.rows)} tensors are there.")
        if not journal.whole:
            seen = _once(stage / _STATISTICS, statistics)
            work = _Work(folder, scheme, plan, source, seen, progress, every)
            for file in plan.files:
                work.write(stage, file, journal)
            report = {"model": _model(folder, source), **_report(scheme, journal, plan, seen)}
            write_json(stage / REPORT_FILE, report)
            copy_companions(folder.path, stage)
            if len(plan.files) > 1:
                write_json(stage / INDEX_FILE, index_content(plan.entries()))
            config = {**folder.disk_config.to_dict("paddle"), "is_quantized": True, QUANTIZATION: settings}
            finish(stage, config=config, digests=journal.digests)
            journal.add(whole=True)
        publish(stage, target)
    report = json.loads((target / REPORT_FILE).read_bytes())
    return Made(report, sum(_num_bytes(tensor) for tensor in plan.table.tensors.values()))


def _once(path: Path, statistics: Callable[[], Statistics]) -> Statistics:
    if path.is_file():
        return Statistics.read(path)
    found = statistics()
    partial = path.with_suffix(".part")
    found.write(partial)
    os.replace(partial, path)
    return found


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * 2  # as bf16, whatever it was


class _Work:
    """One file after the other, one tensor after the other."""

    def __init__(
        self, folder: Folder, scheme: Scheme, plan: _Plan, source: Source, seen: Statistics, progress: Progress,
        every: float,
    ) -> None:  # fmt: skip
        self.folder, self.scheme, self.plan, self.source, self.seen = folder, scheme, plan, source, seen
        self.progress, self.every = progress, every
        self.total = sum(_num_bytes(tensor) for tensor in plan.table.tensors.values())
        self.done_bytes, self.done = 0, 0

    def write(self, stage: Path, file: str, journal: Journal) -> None:
        """Write a file, or what it lacks."""
        parts, path = self.plan.files[file], stage / file
        if file in journal.digests:
            for name in parts:
                self._count(name)
            return
        if not any(name in journal.rows for name in parts):
            entries = [entry for part in parts.values() for entry in part]
            create_safetensors(path, entries, metadata=METADATA["paddle"])
        shared, waiting, last = SharedFile(path), list[dict[str, Any]](), time.monotonic()
        for name in parts:
            if name not in journal.rows:
                waiting.append(self._tensor(name, shared))
                if time.monotonic() - last >= self.every:
                    shared.flush()
                    journal.add(rows=waiting)
                    waiting, last = [], time.monotonic()
            self._count(name)
        shared.flush()
        journal.add(rows=waiting, digests={file: sha256(path)})

    def _count(self, name: str) -> None:
        self.done += 1
        self.done_bytes += _num_bytes(self.plan.table.tensors[name])
        self.progress(self.done_bytes, self.total, f"{self.done}/{len(self.plan.table.tensors)} {name}")

    def _tensor(self, name: str, shared: SharedFile) -> dict[str, Any]:
        """Write a tensor; returns its line of the report."""
        try:
            return self._written(name, shared)
        except CheckpointError:
            self._blame(name)
            raise

    def _blame(self, name: str) -> None:
        """Raise CheckpointError if a part of this tensor holds NaN or infinity, by the name that it has in its file."""
        for atom, _ in self.plan.table.tensors[name].parts:
            stored = self.folder.table.places[atom].tensor
            place = self.folder.path / self.folder.file_of[stored]
            where = f"{place}: '{stored}'" if self.source is self.folder else f"{place}, merged: '{stored}'"
            require_finite(self.source.read(atom).astype(np.float32), name=where)

    def _written(self, name: str, shared: SharedFile) -> dict[str, Any]:
        tensor, encoder = self.plan.table.tensors[name], self.scheme.encoder_of(name)
        where = f"{self.folder.path}: {name}"
        if encoder is None:
            target = shared.array(name)
            fill(target, tensor, self.source)
            for start in range(0, len(target), _ROWS):
                require_finite(target[start : start + _ROWS].astype(np.float32), name=where)
            shared.release(name)
            return {"tensor": name}
        weight = made(tensor, np.dtype(np.float32), self.source)
        arrays = encoder.encode(weight, name=where, hessian_diag=self.seen.squares.get(name))
        row = _judged(name, weight, encoder, arrays)
        row["kind"] = self.scheme.kind_of(name)
        for part, array in {**arrays, **self._scales(name)}.items():
            stored = part if part in self.plan.fields[name] else stored_name(name, part)
            shared.array(stored)[...] = array
            shared.release(stored)
        return row

    def _scales(self, name: str) -> dict[str, np.ndarray]:
        """What was seen of the inputs of a weight, and of the cache that it fills."""
        found: dict[str, np.ndarray] = {}
        if self.scheme.rounds_inputs(name):
            found[ACTIVATION_SCALE] = input_scale(self.scheme.kind_of(name), self.seen.largest[name])
        for stored in self.plan.fields[name]:
            if stored.endswith(CACHE_SCALES):
                found[stored] = self.seen.cache[stored]
        for scale in found.values():
            require_finite(scale, name=f"the calibration of {self.folder.path}: {name}")
        return found


def _judged(name: str, weight: np.ndarray, encoder: Encoder, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How far the codes are from the weight."""
    decoded = encoder.decode(arrays, num_in=len(weight))
    num_out = weight.shape[1]

    def squares(first: np.ndarray, second: np.ndarray | None) -> float:
        def part(rows: slice) -> np.ndarray:
            numbers = first[rows] if second is None else first[rows] - second[rows]
            return np.square(numbers).sum(0)

        return float(sum_rows(len(first), num_out, part).astype(np.float64).sum())

    error, whole = squares(decoded, weight), squares(weight, None)
    return {
        "tensor": name, "shape": list(weight.shape), "bytes": sum(array.nbytes for array in arrays.values()),
        "bits": 8 * sum(array.nbytes for array in arrays.values()) / weight.size, "mse": error / weight.size,
        "mean_square": whole / weight.size, "relative_error": (error / whole) ** 0.5 if whole else 0.0,
    }  # fmt: skip


def _model(folder: Folder, source: Source) -> str | None:
    """The high-precision model, if it is a folder: `eval` compares with it."""
    return str(folder.path.resolve()) if source is folder else None


def _report(scheme: Scheme, journal: Journal, plan: _Plan, seen: Statistics) -> dict[str, Any]:
    rows = [dict(journal.rows[name]) for name in plan.table.tensors if "kind" in journal.rows[name]]
    numbers = sum(math.prod(row["shape"]) for row in rows)
    every = sum(math.prod(tensor.shape) for tensor in plan.table.tensors.values())
    stored = sum(entry.num_bytes for entries in plan.entries().values() for entry in entries)
    error, whole = (sum(row[key] * math.prod(row["shape"]) for row in rows) for key in ("mse", "mean_square"))
    return {
        "format": scheme.format.name, "group_size": scheme.group_size, "int4_layers": scheme.int4_layers,
        "calibration_tokens": seen.tokens, "bytes": stored, "bits_per_weight": 8 * stored / every,
        "bits_per_quantised_weight": 8 * sum(row["bytes"] for row in rows) / numbers,
        "mse": error / numbers, "relative_error": (error / whole) ** 0.5 if whole else 0.0, "tensors": rows,
    }  # fmt: skip
