"""What a quantised folder takes on disk, and how far its weights are from those that it was made from, layer by layer.

The errors are those of its report; without one, they are measured on the high-precision folder, a tensor at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import weight_files
from erniekit.checkpoint.quantised_folder import QuantisedFolder
from erniekit.checkpoint.save import REPORT_FILE
from erniekit.precision.encoders import ACTIVATION_SCALE

_LAYER = re.compile(r"ernie\.(?:layers|mtp_block)\.\d+")
_ROWS = 1024


def size_figures(folder: QuantisedFolder) -> dict[str, float]:
    """disk_bytes: of the weight files. bits_per_weight: of all that is stored. bits_per_quantised_weight: codes and
    scales of what is quantised, without those of its inputs."""
    numbers = {name: math.prod(shape) for name, shape in folder.shapes.items()}
    fields = [(field, array) for name in folder.fields for field, array in folder.arrays(name).items()]
    coded = sum(array.nbytes for field, array in fields if field != ACTIVATION_SCALE)
    stored = sum(opened.read(name).nbytes for name, opened in folder.stored.items())
    return {
        "disk_bytes": sum(path.stat().st_size for path in weight_files(folder.path)),
        "bits_per_weight": 8 * stored / sum(numbers.values()),
        "bits_per_quantised_weight": 8 * coded / sum(numbers[name] for name in folder.fields),
    }


def layer_errors(folder: QuantisedFolder, reference: Folder | None) -> dict[str, float]:
    """error/LAYER: |decoded - weight| / |weight| (Frobenius) over the quantised weights of a layer, and `error` of all
    of them; nothing if there is neither a report nor a reference. Raises CheckpointError if the reference is another
    kind of model."""
    report = report_of(folder)
    if report is None and reference is None:
        return {}
    sums: dict[str, tuple[float, float]] = {}
    for tensor, error, whole in report.rows if report else _measured(folder, reference):
        key = f"error/{match[0] if (match := _LAYER.match(tensor)) else 'other'}"
        before = sums.get(key, (0.0, 0.0))
        sums[key] = before[0] + error, before[1] + whole
    sums["error"] = sum(error for error, _ in sums.values()), sum(whole for _, whole in sums.values())
    return {key: math.sqrt(error / whole) if whole else 0.0 for key, (error, whole) in sums.items()}


class Report(NamedTuple):
    """What the export left beside the weights."""

    model: str | None  # the high-precision folder
    rows: list[tuple[str, float, float]]  # of each tensor the squares of its error and of itself


def report_of(folder: QuantisedFolder) -> Report | None:
    """The report of a folder, if there is one."""
    path = folder.path / REPORT_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        model = values.get("model")
        rows = [_squares(row) for row in values["tensors"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a report of a quantisation. Remove it, or quantise again.") from error
    return Report(model if isinstance(model, str) else None, rows)


def _squares(row: Mapping[str, Any]) -> tuple[str, float, float]:
    size = math.prod(row["shape"])
    return str(row["tensor"]), row["mse"] * size, row["mean_square"] * size


def _measured(folder: QuantisedFolder, reference: Folder | None) -> Iterator[tuple[str, float, float]]:
    assert reference is not None
    for tensor in folder.fields:
        error = whole = 0.0
        for atom, _ in folder.table.tensors[tensor].parts:
            place = reference.table.atoms.get(atom)
            if place is None or place.shape != folder.table.atoms[atom].shape:
                raise CheckpointError(
                    f"{reference.path}: is no reference for {folder.path}: '{atom}' is not there or has another shape."
                )
            decoded, exact = folder.read_atom(atom), reference.read_atom(atom)
            for start in range(0, len(exact), _ROWS):
                weight = exact[start : start + _ROWS].astype(np.float32)
                error += float(np.square(decoded[start : start + _ROWS] - weight).sum(dtype=np.float64))
                whole += float(np.square(weight).sum(dtype=np.float64))
            reference.release(atom)
        folder.release_tensor(tensor)
        yield tensor, error, whole
