"""Whose output folder is it: a new run's, this run's (resume), a finished one's, or another's (refused, or set aside).

`run.json` in the folder holds the run's config and data fingerprint; a lock keeps a second process out. Nothing is ever
deleted: with overwrite_output_dir the old folder is moved to `output_dir.old-N`.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.base.console import notice, warn
from erniekit.base.errors import CheckpointError, ConfigError, MeshError
from erniekit.base.files import write_json, writing
from erniekit.base.machine import packages
from erniekit.checkpoint.save import RUN_FILE
from erniekit.config.run import RunConfig
from erniekit.parallel.mesh import Mesh
from erniekit.training.ranks import first_alone
from erniekit.training.state import named_checkpoint, newest_complete, saved_step

CONFIG_FILE = "run.yaml"
_LOCK = ".lock"
_RANK_LOGS = "ranks"
_BESIDE = ("eval", _RANK_LOGS)  # may be there before a run: earlier figures, and the logs of its ranks
_VERSIONS = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "safetensors", "sentencepiece")


@dataclass
class RunFolder:
    """A claimed output folder. `checkpoint` is where to resume from; `finished` runs have nothing left to do."""

    path: Path
    checkpoint: Path | None = None
    start_step: int = 0
    finished: bool = False
    _lock: int = -1

    def told(self) -> dict[str, Any]:
        """What other ranks are told of it."""
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        return {"checkpoint": checkpoint, "start_step": self.start_step, "finished": self.finished}

    @classmethod
    def of(cls, path: Path, told: dict[str, Any]) -> RunFolder:
        """The folder that another rank has claimed."""
        checkpoint = Path(told["checkpoint"]) if told["checkpoint"] else None
        return cls(path, checkpoint, told["start_step"], finished=told["finished"])

    def mark(self, record: dict[str, Any], *, finished_at: int | None) -> None:
        """Write run.json; `finished_at` is the total number of steps of a finished run."""
        write_json(self.path / RUN_FILE, {**record, "finished_at": finished_at})

    def release(self) -> None:
        """Let another process in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def identity(cfg: RunConfig, *, fingerprint: str, data_ranks: int) -> dict[str, Any]:
    """What a run is known by: its config, its data, on how many ranks with rows of their own it runs, and the packages
    that it began with."""
    installed = packages()
    versions = {name: installed[name] for name in _VERSIONS if name in installed}
    return {"config": cfg.flat(), "data": fingerprint, "data_ranks": data_ranks, "versions": versions}


def require_writable(path: Path) -> None:
    """Raise ConfigError, before any work is done, if `path` exists as a file or cannot be made or written."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir {path}: {nearest} is a file. Choose another output_dir.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir {path}: {nearest} cannot be written. Choose another output_dir.")


def claim(path: Path, cfg: RunConfig, *, record: dict[str, Any], total_steps: int) -> RunFolder:
    """Decide what the output folder `path` is to this run and take it.

    `record` is what identifies the run: {"config": flat config, "data": fingerprint, ...}. Raises ConfigError if the
    folder belongs to another run or process.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
    try:
        folder = _decide(path, cfg, record, total_steps)
        if folder is None:
            os.close(lock)
            _set_aside(path)
            lock = _take_lock(path)
            folder = RunFolder(path)
    except BaseException:
        os.close(lock)
        raise
    folder._lock = lock
    return folder


def claim_together(
    mesh: Mesh, path: Path, cfg: RunConfig, *, record: dict[str, Any], total_steps: int
) -> RunFolder:  # fmt: skip
    """`claim` for several ranks: rank 0 takes the folder, the others are told what it is.

    Raises MeshError on a rank that does not see what rank 0 wrote there.
    """
    taken = first_alone(mesh, "the output folder", lambda: claim(path, cfg, record=record, total_steps=total_steps))
    told = mesh.words.share("what the folder is", taken.told() if taken else None)
    if taken is None and not (path / _LOCK).is_file():
        raise MeshError(
            f"output_dir {path}: rank {mesh.rank} does not see what rank 0 has written there. All machines of a run "
            "need output_dir on a disk that they share."
        )
    return taken or RunFolder.of(path, told)


def _decide(path: Path, cfg: RunConfig, record: dict[str, Any], total_steps: int) -> RunFolder | None:
    """The folder as it is to be used, or None if it is to be set aside."""
    others = sorted(p.name for p in path.iterdir() if not p.name.startswith(".") and p.name not in _BESIDE)
    if not others:
        return RunFolder(path)
    overwrite = cfg.train.overwrite_output_dir
    if not (path / RUN_FILE).is_file():
        if overwrite:
            return None
        raise ConfigError(
            f"output_dir {path} is not empty and holds no run of ours ({', '.join(others[:5])}). "
            "Choose another output_dir, or set overwrite_output_dir=true to move it to a '.old-N' folder."
        )
    earlier = json.loads((path / RUN_FILE).read_bytes())
    differences = _differences(cfg, record, earlier)
    if differences and not cfg.train.resume_anyway:
        if overwrite:
            return None
        raise ConfigError(
            [
                f"output_dir {path} holds another run. What differs:",
                *(f"  {line}" for line in differences),
                "Choose another output_dir; or set overwrite_output_dir=true to move the old run to a '.old-N' folder; "
                "or resume_anyway=true to go on from its last checkpoint with the new settings.",
            ]
        )
    for line in differences:
        warn(f"resuming although {line}")
    return _resume(path, cfg, earlier, total_steps, overwrite=overwrite)


def _resume(
    path: Path, cfg: RunConfig, earlier: dict[str, Any], total_steps: int, *, overwrite: bool
) -> RunFolder | None:
    finished_at = earlier.get("finished_at")
    if finished_at is not None and finished_at >= total_steps:
        if overwrite:
            return None
        return RunFolder(path, start_step=finished_at, finished=True)
    asked = cfg.train.resume_from_checkpoint
    checkpoint = named_checkpoint(Path(asked)) if asked else newest_complete(path)
    if checkpoint is None:
        if finished_at is not None:
            raise CheckpointError(
                f"{path}: the run finished at step {finished_at} and kept no checkpoint, so it cannot go on to step "
                f"{total_steps}."
            )
        return RunFolder(path)
    step = saved_step(checkpoint)
    if step > total_steps:
        raise ConfigError(f"{checkpoint} is at step {step}, beyond the {total_steps} steps of this run.")
    notice(f"resuming from {checkpoint} (step {step} of {total_steps})")
    return RunFolder(path, checkpoint=checkpoint, start_step=step)


def _differences(cfg: RunConfig, record: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """What makes it another run. How rows are divided among ranks does not: `batch_size` counts those of one."""
    changed = {key: (old, new) for key, old, new in cfg.difference(earlier["config"]) if key != "batch_size"}
    lines = [f"{key}: was {old!r}, is {new!r}" for key, (old, new) in changed.items()]
    before, now, ranks = _rows(earlier), _rows(record), record["data_ranks"]
    if before != now:
        way_out = f" (batch_size={before // ranks} keeps them)" if before % ranks == 0 else ""
        lines.append(f"rows of a micro-batch, batch_size x ranks with rows of their own: {before}, now {now}{way_out}")
    elif earlier.get("data") != record["data"] and "gradient_accumulation_steps" not in changed:  # whose product with
        lines.append("the content of the training data")  # those rows counts as content
    return lines


def _rows(record: dict[str, Any]) -> int:
    return record["config"].get("batch_size", 1) * record.get("data_ranks", 1)


def _set_aside(path: Path) -> None:
    number = 1
    while (old := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(old)
    path.mkdir()
    if (old / _RANK_LOGS).is_dir():
        (old / _RANK_LOGS).rename(path / _RANK_LOGS)  # ranks of this run write there already
    notice(f"moved the earlier run to {old}")


def _take_lock(path: Path) -> int:
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"output_dir {path}: another process is training there.") from error
    return descriptor
