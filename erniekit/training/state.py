"""Checkpoints of a run: `output_dir/checkpoint-N`, whole or absent.

A checkpoint is a model folder (weights in fp32, config, tokenizer) plus `training/` with the optimizer's state and the
step. The data position and the random numbers of a step follow from (seed, step), so N says all. It is written under a
temporary name, fsynced, sealed with a sha256 manifest and renamed. All ranks write it together; what they write does
not depend on who holds what, so that any layout goes on from it.

Saved in the background, a checkpoint is first a copy in host memory, of what a rank will write of weights (in fp32) and
states. A thread writes that while training goes on; the next save waits for it. It stands when it is renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle

from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError
from erniekit.base.files import fsync_folder, write_json, writing
from erniekit.checkpoint.chosen import numbered
from erniekit.checkpoint.hf_files import format_tag
from erniekit.checkpoint.manifest import MANIFEST_FILE, check_manifest, write_manifest
from erniekit.checkpoint.model_io import Ranges, Writer, host_array
from erniekit.checkpoint.named import Named, Numbers
from erniekit.checkpoint.together import SharedStage
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.optimizer import Optimizer

_OPTIMIZER = "training/optimizer.safetensors"
_MEMORY = "training/memory.safetensors"
_STATE = "training/state.json"


class Memory(Protocol):
    """What a run carries from step to step beside weights and optimizer: tensors by name."""

    def state(self) -> Mapping[str, paddle.Tensor]:
        """The tensors as they are now, not copied."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` of an equal run returned."""


class MakeWriter(Protocol):
    """Gives what writes the weights of a model as they are now (`copied`), or as they will be then."""

    def __call__(self, model: ErnieForCausalLM, *, ranges: Ranges, copied: bool) -> Writer:
        """See MakeWriter; `ranges` is the optimizer's."""


@dataclass
class _Save:
    """A checkpoint on its way to the disk."""

    folder: Path
    stage: SharedStage
    best: int
    thread: threading.Thread | None = None
    error: BaseException | None = None


class Checkpoints:
    """The checkpoints of one output folder."""

    def __init__(
        self, output_dir: Path, *, writer: MakeWriter, describe: dict[str, Any], keep: int | None = None,
        mesh: Mesh = Mesh.single(), background: bool = False, tell: Callable[[Path], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """`writer` is about the model folder; `describe` (config, data, versions) goes into each checkpoint; `keep` of
        the newest ones are kept (None: all); with `background`, training goes on while one is written. `tell` is called
        with each that stands."""
        self._dir, self._writer, self._describe, self._keep = output_dir, writer, describe, keep
        self._mesh, self._background, self._tell = mesh, background, tell
        self._open: _Save | None = None

    def save(
        self, model: ErnieForCausalLM, optimizer: Optimizer, *,
        step: int, progress: dict[str, Any], memory: Memory | None = None, best: int = 0,
    ) -> Path:  # fmt: skip
        """Write checkpoint-`step` with what the run has found out so far (`progress`, `memory`), then remove what
        exceeds the limit, but never that of step `best`. All ranks call it. Raises CheckpointError if the disk refuses;
        in the background, the next call or `wait` does."""
        self.wait()
        final = self._dir / f"checkpoint-{step}"
        save = _Save(final, SharedStage(self._mesh, lambda: _unpublished(final)), best)
        write_model = self._writer(model, ranges=optimizer.ranges(), copied=self._background)
        named = _named(model, self._mesh)
        tensors = {_OPTIMIZER: _states(optimizer), _MEMORY: _kept(memory)}
        if self._background:
            tensors = {file: named.copied(self._mesh, numbers) for file, numbers in tensors.items()}
        facts = {"step": step, "optimizer_steps": optimizer.num_steps, "progress": progress, **self._describe}
        facts = json.loads(json.dumps(facts))  # as they are now

        def write() -> None:
            with save.stage as stage:
                write_model(stage.path, stage.team)
                digests: dict[str, str] = {}
                for file, numbers in tensors.items():
                    if numbers:
                        digests |= named.write(stage, file, numbers)
                if self._mesh.first:
                    write_json(stage.path / _STATE, facts)
                    write_manifest(stage.path, known=_digests(stage.path) | digests)

        def write_quietly() -> None:
            try:
                write()
            except BaseException as error:  # noqa: BLE001 - `wait` raises it where somebody hears it
                save.error = error

        self._open = save
        if self._background:
            # A daemon: who dies for another reason does not wait for the disk first, and others wait for its death.
            save.thread = threading.Thread(target=write_quietly, name=final.name, daemon=True)
            save.thread.start()
        else:
            write()
            self.wait()
        return final

    @property
    def writing(self) -> bool:
        """Whether this rank is writing in the background."""
        return self._open is not None and self._open.thread is not None and self._open.thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether `wait` is going to raise, as far as this rank knows."""
        return self._open is not None and not self.writing and (self._open.error is not None or self._open.stage.failed)

    def wait(self) -> None:
        """Go on when no checkpoint is on its way any more. All ranks call it. Raises what went wrong in writing."""
        save, self._open = self._open, None
        if save is None:
            return
        if save.thread:
            save.thread.join()
        if save.error:
            raise save.error
        save.stage.settle()
        self._tell(save.folder)
        if self._mesh.first:
            self._prune(save.best)

    def newest_step(self) -> int:
        """The step of the newest checkpoint by name; 0 if there is none. All ranks call it."""
        self.wait()
        return max((step for step, _ in numbered(self._dir)), default=0)

    def _prune(self, best: int) -> None:
        if not self._keep or self._keep < 1:
            return
        for step, old in numbered(self._dir)[: -self._keep]:
            if step == best:
                continue
            doomed = old.with_name(f".{old.name}.removed")
            old.rename(doomed)  # a kill in between leaves no half checkpoint under its name
            shutil.rmtree(doomed)


@contextlib.contextmanager
def _unpublished(final: Path) -> Iterator[Path]:
    """A folder beside `final` that is renamed to it if the block succeeds, and removed if not."""
    temporary = final.with_name(f".{final.name}.tmp")
    with writing(final):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            (temporary / "training").mkdir(parents=True)
            yield temporary
            shutil.rmtree(final, ignore_errors=True)  # a broken one of this name was passed over on resume
            temporary.rename(final)
            fsync_folder(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _named(model: ErnieForCausalLM, mesh: Mesh) -> Named:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return Named(model.config, shapes, mesh.layout, mesh.rank)


def _states(optimizer: Optimizer) -> dict[str, Numbers]:
    """What this rank has of the optimizer's state."""
    pieces = {f"{piece.name}.{piece.part}": piece for piece in optimizer.pieces()}
    found = {}
    for key, tensor in optimizer.state().items():
        piece = pieces.get(key)
        span = (piece.start, piece.stop) if piece else None
        found[key] = replace(_numbers(tensor), span=span)
    return found


def _kept(memory: Memory | None) -> dict[str, Numbers]:
    return {key: _numbers(tensor) for key, tensor in memory.state().items()} if memory else {}


def _numbers(tensor: paddle.Tensor) -> Numbers:
    return Numbers(lambda: host_array(tensor), _format(tensor), tuple(tensor.shape))


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; broken ones are named and passed over."""
    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for _, folder in reversed(numbered(output_dir)):
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


def load_optimizer(folder: Path, optimizer: Optimizer, model: ErnieForCausalLM, mesh: Mesh) -> None:
    """Take over the optimizer state of a checkpoint, as far as this rank has it."""
    spans = {name: optimizer.held(name) for name in optimizer.parameters}
    state = _named(model, mesh).read(folder / _OPTIMIZER, spans)
    optimizer.load_state(state, num_steps=_state(folder)["optimizer_steps"], source=str(folder))


def load_memory(folder: Path, memory: Memory, model: ErnieForCausalLM, mesh: Mesh) -> None:
    """Take over what the run carried when `folder` was saved; nothing if it carried nothing."""
    if (folder / _MEMORY).is_file():
        memory.load_state(_named(model, mesh).read(folder / _MEMORY, {}))


def _digests(folder: Path) -> dict[str, str]:
    """What the model's own manifest says already, so that weights are not read again."""
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def _format(tensor: paddle.Tensor) -> str:
    return format_tag(np.dtype(str(tensor.dtype).removeprefix("paddle.")))
