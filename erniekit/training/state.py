"""Checkpoints of a run: `output_dir/checkpoint-N`, whole or absent.

A checkpoint is a model folder (weights in fp32, config, tokenizer) plus `training/` with the optimizer's state and the
step. The data position and the random numbers of a step follow from (seed, step), so N says all. It is written under a
temporary name, fsynced, sealed with a sha256 manifest and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle

from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError
from erniekit.base.files import fsync_folder, write_json, writing
from erniekit.checkpoint.hf_files import FORMATS, Entry, SafetensorsFile, format_tag, write_safetensors
from erniekit.checkpoint.manifest import MANIFEST_FILE, check_manifest, write_manifest
from erniekit.checkpoint.model_io import host_array
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.optimizer import Optimizer
from erniekit.training.ranks import first_alone

_NAME = re.compile(r"checkpoint-(\d+)")
_OPTIMIZER = "training/optimizer.safetensors"
_MEMORY = "training/memory.safetensors"
_STATE = "training/state.json"

SaveModel = Callable[[ErnieForCausalLM, Path], None]


class Memory(Protocol):
    """What a run carries from step to step beside weights and optimizer: tensors by name."""

    def state(self) -> Mapping[str, paddle.Tensor]:
        """The tensors as they are now, not copied."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` of an equal run returned."""


class Checkpoints:
    """The checkpoints of one output folder."""

    def __init__(
        self, output_dir: Path, *, save_model: SaveModel, describe: dict[str, Any], keep: int | None = None,
        mesh: Mesh = Mesh.single(),
    ) -> None:  # fmt: skip
        """`save_model` writes a model folder; `describe` (config, data, versions) goes into each checkpoint; `keep` of
        the newest ones are kept (None: all)."""
        self._dir, self._save_model, self._describe, self._keep = output_dir, save_model, describe, keep
        self._mesh = mesh

    def save(
        self, model: ErnieForCausalLM, optimizer: Optimizer, *,
        step: int, progress: dict[str, Any], memory: Memory | None = None, best: int = 0,
    ) -> Path:  # fmt: skip
        """Write checkpoint-`step` with what the run has found out so far (`progress`, `memory`), then remove what
        exceeds the limit, but never that of step `best`. All ranks call it. Raises CheckpointError if the disk
        refuses."""
        final = self._dir / f"checkpoint-{step}"

        temporary = self._dir / f".{final.name}.tmp"
        try:
            first_alone(self._mesh, "a new checkpoint", lambda: _make_anew(temporary))
            self._save_model(model, temporary)
            facts = {"step": step, "optimizer_steps": optimizer.num_steps, "progress": progress, **self._describe}
            first_alone(self._mesh, "a saved state", lambda: _write_state(temporary, optimizer, memory, facts=facts))
            first_alone(self._mesh, "a saved checkpoint", lambda: self._publish(temporary, final, best=best))
        finally:
            if self._mesh.first:
                shutil.rmtree(temporary, ignore_errors=True)
        return final

    def _publish(self, temporary: Path, final: Path, *, best: int) -> None:
        with writing(final):
            write_manifest(temporary, known=_digests(temporary))
            shutil.rmtree(final, ignore_errors=True)  # a broken one of this name was passed over on resume
            temporary.rename(final)
            fsync_folder(self._dir)
        self._prune(best)

    def newest_step(self) -> int:
        """The step of the newest checkpoint by name; 0 if there is none."""
        return max((step for step, _ in numbered(self._dir)), default=0)

    def _prune(self, best: int) -> None:
        if not self._keep or self._keep < 1:
            return
        for step, old in sorted(numbered(self._dir))[: -self._keep]:
            if step == best:
                continue
            doomed = old.with_name(f".{old.name}.removed")
            old.rename(doomed)  # a kill in between leaves no half checkpoint under its name
            shutil.rmtree(doomed)


def _make_anew(folder: Path) -> None:
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "training").mkdir(parents=True)


def _write_state(folder: Path, optimizer: Optimizer, memory: Memory | None, *, facts: dict[str, Any]) -> None:
    """Everything of a checkpoint beside the model."""
    with writing(folder):
        _write_tensors(folder / _OPTIMIZER, optimizer.state())
        if kept := memory.state() if memory else {}:
            _write_tensors(folder / _MEMORY, kept)
        write_json(folder / _STATE, facts)


def numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint."""
    if not output_dir.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    return [(int(match[1]), path) for match, path in matches if match]


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; broken ones are named and passed over."""
    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for _, folder in sorted(numbered(output_dir), reverse=True):
        problems = check_manifest(folder)
        if not problems:
            return folder
        warn(f"{folder} is broken and passed over: {problems[0]}")
    return None


def named_checkpoint(path: Path) -> Path:
    """The checkpoint that the user named with resume_from_checkpoint. Raises CheckpointError if it is not whole."""
    is_checkpoint = (path / _STATE).is_file()
    problems = check_manifest(path) if is_checkpoint else [f"{path}: holds no {_STATE}; it is no checkpoint."]
    if problems:
        raise CheckpointError(["resume_from_checkpoint cannot be used:", *problems])
    return path


def saved_step(folder: Path) -> int:
    """How many steps had been taken when `folder` was saved."""
    return int(_state(folder)["step"])


def saved_progress(folder: Path) -> dict[str, Any]:
    """What the run had found out when `folder` was saved."""
    return _state(folder).get("progress", {})


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _STATE).read_bytes())


def load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Take over the optimizer state of a checkpoint."""
    state = _read_tensors(folder / _OPTIMIZER)
    optimizer.load_state(state, num_steps=_state(folder)["optimizer_steps"], source=str(folder))


def load_memory(folder: Path, memory: Memory) -> None:
    """Take over what the run carried when `folder` was saved; nothing if it carried nothing."""
    if (folder / _MEMORY).is_file():
        memory.load_state(_read_tensors(folder / _MEMORY))


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def _digests(folder: Path) -> dict[str, str]:
    """What the model's own manifest says already, so that weights are not read again."""
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def _write_tensors(path: Path, state: Mapping[str, paddle.Tensor]) -> None:
    """Stream the state tensor by tensor: it is never held twice."""

    def arrays(entries: list[Entry]) -> Iterator[np.ndarray]:
        for entry in entries:
            yield host_array(state[entry.name]).astype(FORMATS[entry.tag], copy=False)

    entries = [Entry(name, _format(tensor), tuple(tensor.shape)) for name, tensor in state.items()]
    write_safetensors(path, entries, arrays=arrays, metadata={})


def _format(tensor: paddle.Tensor) -> str:
    return format_tag(np.dtype(str(tensor.dtype).removeprefix("paddle.")))
