"""Keeps a step that went wrong, whole: the weights before its update, its batches, its seed, its config, its samples.

`output_dir/replay/step-N` is a model folder with `training/` beside the weights, written as checkpoints are: whole or
absent. Knows how to keep a step and how to read it back; looking into it is recipes/replay.py's.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError, MeshError
from erniekit.base.files import fsync_folder, write_json, writing
from erniekit.checkpoint.manifest import check_manifest, write_manifest
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.run import RunConfig
from erniekit.data.batch import Batch, PreferenceBatch, Row
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.preference import Reference
from erniekit.training.ranks import first_alone

FOLDER = "replay"
CONFIG_FILE = "training/run.yaml"
_FACTS = "training/replay.json"
_BATCHES = "training/batches.npz"
_MOST_SPIKES = 2  # bundles of one run: each is as large as the model in fp32
_WINDOW, _LEAST = 50, 10  # steps that a loss is compared with, and how many of them there must be
_SCALES = "training/scales.npz"
_REFERENCE = "reference"
_ARRAYS = ("batches", _REFERENCE, "scales")  # of what is kept


@dataclass(frozen=True)
class Kept:
    """A step as it was kept. `samples` names the documents of each row of each micro-batch, in their order. Of a step
    with a reference, its log-probabilities of the answers of each micro-batch are kept, whatever they came from; of a
    run in FP8, the scales that steps before have found (precision/qat.py)."""

    step: int  # 0-based
    reason: str
    loss: float
    seed: int
    samples: list[list[list[str]]]
    batches: list[Batch]
    reference: list[np.ndarray]
    scales: Mapping[str, Any]  # arrays


class StepKeeper:
    """Watches the losses of a run and writes down the steps that are worth a look."""

    def __init__(
        self, output_dir: Path, cfg: RunConfig, *, save_model: Callable[[ErnieForCausalLM, Path], None],
        losses: Iterable[float], mesh: Mesh = Mesh.single(),
    ) -> None:  # fmt: skip
        """`losses` are those of the steps so far: what a spike is does not depend on where a run was cut."""
        self._folder, self._cfg, self._save_model, self._mesh = output_dir / FOLDER, cfg, save_model, mesh
        self._losses, self._first = deque[float](maxlen=_WINDOW), 0.0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """A step was taken."""
        if not self._losses and self._cfg.model.stage in PREFERENCE_STAGES:
            self._first = loss  # what later falls towards 0 need not be alike from step to step
        self._losses.append(loss)

    def spike(self, loss: float) -> str:
        """Why this loss is a spike, or an empty text."""
        factor = self._cfg.watch.spike_factor
        if not factor or len(self._losses) < _LEAST:
            return ""
        usual = max(statistics.median(self._losses), self._first)
        if not loss > factor * usual:
            return ""
        return f"its loss {loss:.4g} is more than {factor:g} times the median {usual:.4g} of the steps before"

    def keep(
        self, model: ErnieForCausalLM, *, step: int, reason: str, loss: float, batches: Sequence[Batch],
        rows: Sequence[Row], reference: Reference | None = None, scales: Mapping[str, np.ndarray] | None = None,
    ) -> Path | None:  # fmt: skip
        """Write the bundle of the 0-based `step`; None, with a warning, if the disk has no room for it or refuses.

        All ranks call it, with the micro-batches of all of them; rank 0 writes.
        """
        final, words = self._folder / f"step-{step + 1}", self._mesh.words
        if words.share("it is kept already", final.exists()):
            return final
        if np.isfinite(loss) and words.share("steps kept", len(list(self._folder.glob("step-*")))) >= _MOST_SPIKES:
            warn(f"step {step + 1}: {reason}. It is not kept: {self._folder} holds {_MOST_SPIKES} steps already.")
            return None
        logps = [reference(model, b).numpy() for b in batches if reference and isinstance(b, PreferenceBatch)]
        kept = Kept(step, reason, loss, self._cfg.train.seed, _names(batches, rows), list(batches), logps, scales or {})
        try:
            self._write(final, model, kept)
        except (CheckpointError, MeshError) as error:
            warn(f"step {step + 1}: {reason}. It could not be kept for replay: {error}")
            return None
        warn(f"step {step + 1}: {reason}. It is kept; look into it with: erniekit replay {final}")
        return final

    def _write(self, final: Path, model: ErnieForCausalLM, kept: Kept) -> None:
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            first_alone(self._mesh, "room for a step", lambda: self._make_room(temporary, model))
            self._save_model(model, temporary)
            first_alone(self._mesh, "a kept step", lambda: self._describe(temporary, final, kept))
        finally:
            if self._mesh.first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _make_room(self, temporary: Path, model: ErnieForCausalLM) -> None:
        _require_room(self._folder.parent, model)
        with writing(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "training").mkdir(parents=True)

    def _describe(self, temporary: Path, final: Path, kept: Kept) -> None:
        with writing(final):
            facts = {name: value for name, value in asdict(kept).items() if name not in _ARRAYS}
            write_json(temporary / _FACTS, facts)
            np.savez(temporary / _BATCHES, **_arrays(kept))
            if kept.scales:
                np.savez(temporary / _SCALES, **kept.scales)
            self._cfg.write_resolved(temporary / CONFIG_FILE)
            write_manifest(temporary)
            temporary.rename(final)
            fsync_folder(final.parent)


def _names(batches: Sequence[Batch], rows: Sequence[Row]) -> list[list[list[str]]]:
    """The names of the documents in each row of each micro-batch."""
    names, start = [], 0
    for batch in batches:
        part = rows[start : start + len(batch.labels)]
        names.append([[document.name for document in row.documents] for row in part])
        start += len(part)
    return names


def _arrays(kept: Kept) -> dict[str, Any]:
    """Number of the micro-batch, a dot, and the name of the array."""
    found = {f"{i}.{_REFERENCE}": logps for i, logps in enumerate(kept.reference)}
    for i, batch in enumerate(kept.batches):
        found |= {f"{i}.{field.name}": getattr(batch, field.name) for field in fields(batch)}
    return found


def _batch(arrays: dict[str, Any]) -> Batch:
    if "chosen" not in arrays:
        return Batch(**arrays)
    names: list[str] = arrays.pop("names").tolist()
    return PreferenceBatch(names=tuple(names), **arrays)


def _require_room(folder: Path, model: ErnieForCausalLM) -> None:
    wanted = 2 * sum(4 * int(np.prod(p.shape)) for p in model.parameters())  # as much again stays free
    if shutil.disk_usage(folder).free < wanted:
        raise CheckpointError(f"{folder}: less than {wanted / 1e9:.1f} GB are free.")


def read_kept(folder: Path) -> Kept:
    """The step kept in `folder`; raises CheckpointError if it is none, or damaged."""
    if not (folder / _FACTS).is_file():
        inside = sorted(str(path) for path in (folder / FOLDER).glob("step-*"))
        hint = f" It has kept: {', '.join(inside)}." if inside else " Steps are kept in output_dir/replay/step-N."
        raise CheckpointError(f"{folder}: is no kept step (no {_FACTS}).{hint}")
    if problems := check_manifest(folder):
        raise CheckpointError(problems)
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_bytes())
    with np.load(folder / _BATCHES) as stored:
        found: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        for place in stored.files:
            number, _, name = place.partition(".")
            found[int(number)][name] = stored[place]
    parts = [found[number] for number in sorted(found)]
    reference = [part.pop(_REFERENCE) for part in parts if _REFERENCE in part]
    scales = dict(np.load(folder / _SCALES)) if (folder / _SCALES).is_file() else {}
    return Kept(**facts, batches=[_batch(part) for part in parts], reference=reference, scales=scales)
