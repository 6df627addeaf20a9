"""Writes a model folder: streamed weights, index, config.json, companions and manifest, all or nothing.

Everything is written into a hidden folder inside the target and moved into place at the end, config.json last: a
half-written model is never taken for a whole one. Refuses to know training state: checkpoints add theirs on top.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.errors import CheckpointError
from erniekit.base.files import fsync_file, fsync_folder, write_json, writing
from erniekit.checkpoint.adapter_forms import CONFIG_FILES, ERNIEKIT_INDEX
from erniekit.checkpoint.ernie45 import HEAD_BIAS, Form, Table, is_mtp, layout_table, memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import (
    BFLOAT16,
    FORMATS,
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    index_content,
    plan_shards,
    weight_files,
    write_safetensors,
)
from erniekit.checkpoint.manifest import MANIFEST_FILE, write_manifest
from erniekit.checkpoint.pieces import Span
from erniekit.checkpoint.source import Memory, Source, made
from erniekit.checkpoint.together import File, SharedStage, Team, share_of, write_files
from erniekit.config.architecture import ErnieConfig

GB = 10**9
MAX_SHARD_BYTES = 5 * GB
ORIGIN_FILE = "erniekit_origin.json"
# The published -Paddle files say U16, so every reader of that layout knows it; -PT readers know BF16.
BF16_TAG = {"pt": "BF16", "paddle": "U16"}
METADATA = {"pt": {"format": "pt"}, "paddle": {"format": "np"}}

STAGE = ".saving"  # inside the target, until the folder is whole
JOURNAL = ".journal"  # in the stage of an export that goes on after a kill
_COMPANION_SUFFIXES = (".json", ".model", ".jinja", ".txt", ".md", ".py", ".ttf")
RUN_FILE = "run.json"  # what a training run writes about itself; it is not the model's
MERGE_FILE = "erniekit_merge.json"  # beside a merged model: of what, and how near it is to that
ADAPTER_FILE = "erniekit_adapter.json"  # what only we know of an adapter: the mark of its base
REPORT_FILE = "erniekit_quantisation.json"  # beside quantised weights: how far each is from what it was
_NOT_COMPANIONS = {
    "config.json", INDEX_FILE, MANIFEST_FILE, ORIGIN_FILE, RUN_FILE, MERGE_FILE, ADAPTER_FILE, REPORT_FILE,
    ERNIEKIT_INDEX,
    *CONFIG_FILES.values(),
}  # fmt: skip
_COMPANION_MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class Plan:
    """What will be written: the layout's table, and which file holds which tensor in which format."""

    table: Table
    shards: dict[str, list[Entry]]
    metadata: dict[str, dict[str, str]]  # by file

    @classmethod
    def new(cls, table: Table, tags: Mapping[str, str], *, layout: str, max_shard_bytes: int) -> Plan:
        """Shards in model order; `tags` gives the format of each tensor."""
        entries = [Entry(name, tags[name], tensor.shape) for name, tensor in table.tensors.items()]
        shards = plan_shards(entries, max_shard_bytes=max_shard_bytes)
        return cls(table, shards, dict.fromkeys(shards, METADATA[layout]))

    def files(self) -> dict[str, File]:
        """The same, as many ranks write it."""
        return {name: File(entries, self.table, self.metadata[name]) for name, entries in self.shards.items()}

    def write_index(self, stage: Path) -> None:
        """The index of several shards."""
        if set(self.shards) != {SINGLE_FILE}:
            write_json(stage / INDEX_FILE, index_content(self.shards))


# ---------------------------------------------------------------------- folders that are whole or absent
def require_empty(path: str | Path) -> None:
    """Refuse to write a new model over anything."""
    if Path(path).is_dir() and any(entry.name != STAGE for entry in Path(path).iterdir()):
        raise CheckpointError(f"{path}: is not empty. Choose another folder, or remove what is in it.")


@contextlib.contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """A hidden folder inside `path` whose files are moved into `path` if the block succeeds, and removed if it fails.

    Weight files that an earlier model left in `path` give way to the new ones.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; a model is saved as a folder. Choose another name.")
    stage = folder / STAGE
    with writing(folder):
        created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        shutil.rmtree(stage, ignore_errors=True)  # what a killed process left
        try:
            stage.mkdir(parents=True)
            yield stage
            _drop_stale(stage, folder)
            publish(stage, folder)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def publish(stage: Path, folder: Path) -> None:
    """Move a whole model out of its stage, config.json last, and remove the stage with what is hidden in it.

    The journal goes last: as long as anything is left to do, a killed export knows it.
    """
    names = sorted(
        (path.name for path in stage.iterdir() if not path.name.startswith(".")),
        key=lambda name: (name == "config.json", name),
    )
    for name in names:
        os.replace(stage / name, folder / name)
    fsync_folder(folder)
    for path in sorted(stage.iterdir(), key=lambda path: path.name == JOURNAL):
        path.unlink()
    stage.rmdir()


def _drop_stale(stage: Path, folder: Path) -> None:
    """Remove the weight files of an earlier model that new ones do not replace."""
    stale = {path.name for path in [*weight_files(folder), folder / INDEX_FILE] if not (stage / path.name).exists()}
    for name in stale if any(weight_files(stage)) else ():
        (folder / name).unlink(missing_ok=True)


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer, generation config and other small files of a model folder."""
    for path in sorted(Path(source).iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        small = path.is_file() and path.stat().st_size <= _COMPANION_MAX_BYTES
        if wanted and small and path.name not in _NOT_COMPANIONS:
            copy = Path(target) / path.name
            shutil.copyfile(path, copy)
            fsync_file(copy)


# ---------------------------------------------------------------------- weights
def write_weights(stage: Path, plan: Plan, source: Source, *, workers: int = 0) -> dict[str, str]:
    """Write all shards and the index; returns their sha256. At most `workers` + 2 tensors are in memory at a time."""
    digests = {}
    for file, entries in plan.shards.items():
        digests[file] = write_safetensors(
            stage / file, entries, metadata=plan.metadata[file],
            arrays=lambda ordered: _arrays(ordered, plan.table, source, workers=workers),
        )  # fmt: skip
    plan.write_index(stage)
    return digests


def _arrays(entries: list[Entry], table: Table, source: Source, *, workers: int) -> Iterator[np.ndarray]:
    def make(entry: Entry) -> np.ndarray:
        dtype = BFLOAT16 if entry.tag == "U16" else FORMATS[entry.tag]
        return made(table.tensors[entry.name], dtype, source)

    if not workers:
        yield from map(make, entries)
        return
    ahead: deque[Future[np.ndarray]] = deque()
    waiting = iter(entries)
    with ThreadPoolExecutor(workers) as pool:
        for entry in entries:
            while len(ahead) <= workers and (following := next(waiting, None)) is not None:
                ahead.append(pool.submit(make, following))
            yield ahead.popleft().result()
            for atom, _ in table.tensors[entry.name].parts:
                source.release(atom)


def finish(stage: Path, *, config: bytes | dict[str, Any], digests: Mapping[str, str]) -> None:
    """Write config.json and the manifest: the last two files of a model folder."""
    if isinstance(config, dict):
        write_json(stage / "config.json", config)
    else:
        (stage / "config.json").write_bytes(config)
        fsync_file(stage / "config.json")
    write_manifest(stage, known=digests)


def save_folder(
    path: str | Path, parameters: Mapping[str, np.ndarray], *, cfg: ErnieConfig, layout: str, dtype: str,
    base: Folder | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
    team: Team | None = None, spans: Mapping[str, Span] | None = None,
) -> None:  # fmt: skip
    """Save a model in memory (parameter name -> array; the mapping may fetch lazily) as a folder in "pt" or "paddle".

    `dtype` is "bfloat16" or "float32"; routers and correction biases are always fp32. `base` is the folder that the
    model came from: it gives the tokenizer and other companions, the way bfloat16 is tagged, the tied copy of the head,
    and multi-token prediction weights that the model did not load.

    With a `team` of several ranks, all of them call this, each with its blocks of the parameters (or, of those that
    `spans` names, with that much of the block): the files are the same.
    """
    head_bias = HEAD_BIAS in parameters
    table = memory_table(cfg, head_bias=head_bias)
    assert set(table.tensors) == set(parameters), "the model does not match its config"
    plan, config, carried = _plan(cfg, layout, table, dtype=dtype, base=base, max_shard_bytes=max_shard_bytes)
    if team is not None and team.layout.world > 1:
        stage = SharedStage(team, lambda: staged(path))
        with stage:
            share = share_of(
                stage.team, lambda cut: memory_table(cfg, head_bias=head_bias, cut=cut), parameters, spans=spans
            )  # fmt: skip
            if carried and base:
                share = replace(share, also=base, others=frozenset(carried[team.rank :: team.layout.world]))
            digests = write_files(stage, plan.files(), share)
            if team.rank == 0:
                plan.write_index(stage.path)
                _accompany(stage.path, config.to_dict(layout), digests=digests, base=base)
        stage.settle()
        return
    memory: Source = Memory(table, parameters)
    with staged(path) as folder:
        digests = write_weights(folder, plan, _Carrying(memory, base, carried) if carried and base else memory)
        _accompany(folder, config.to_dict(layout), digests=digests, base=base)


def _plan(
    cfg: ErnieConfig, layout: str, memory: Table, *, dtype: str, base: Folder | None, max_shard_bytes: int
) -> tuple[Plan, ErnieConfig, list[str]]:
    """What is written of the model that `memory` lays out, its config, and the atoms that come from `base`."""
    form = replace(
        Form.usual(cfg, layout, mtp_layers=cfg.num_nextn_predict_layers), head_bias=HEAD_BIAS in memory.tensors
    )
    tag, config = BF16_TAG[layout], cfg.replace(dtype=dtype)
    if base is not None:
        if base.form.mtp_layers > form.mtp_layers and not cfg.is_reward:
            form = replace(form, mtp_layers=base.form.mtp_layers)
            config = config.replace(num_nextn_predict_layers=base.disk_config.num_nextn_predict_layers)
        if base.layout == layout:
            stored = base.form
            form = replace(form, head_copy=stored.head_copy, head_rows=stored.head_rows, mtp_rows=stored.mtp_rows)
            tag = next((base.tag(name) for name in base.names if base.tag(name) != "F32"), tag)
    table = layout_table(cfg, layout, form)
    tags = {
        name: "F32" if dtype == "float32" or any(table.atoms[atom].fp32 for atom, _ in tensor.parts) else tag
        for name, tensor in table.tensors.items()
    }
    carried = [atom for atom in table.atoms if is_mtp(atom) and atom not in memory.atoms]
    return Plan.new(table, tags, layout=layout, max_shard_bytes=max_shard_bytes), config, carried


def _accompany(stage: Path, config: dict[str, Any], *, digests: Mapping[str, str], base: Folder | None) -> None:
    """What lies beside the weights."""
    if base is not None:
        copy_companions(base.path, stage)
    finish(stage, config=config, digests=digests)


class _Carrying:
    """The atoms of a model in memory, and from a folder the multi-token prediction atoms that the model lacks."""

    def __init__(self, memory: Source, base: Folder, carried: Collection[str]) -> None:
        self.memory, self.base, self.carried = memory, base, set(carried)

    def _holder(self, atom: str) -> Source:
        return self.base if atom in self.carried else self.memory

    def read(self, atom: str) -> np.ndarray:
        return self._holder(atom).read(atom)

    def release(self, atom: str) -> None:
        self._holder(atom).release(atom)
