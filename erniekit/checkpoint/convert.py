"""Any model folder into the other layout, tensor by tensor.

What the new layout cannot express (bfloat16 tags, shards, a tied copy of the head, the original config.json) is kept
beside it in erniekit_origin.json, so that converting back gives the same names, formats and bytes. That file is a hint:
where it no longer fits what lies beside it, the weights and config.json win.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError
from erniekit.base.files import write_json
from erniekit.checkpoint.ernie45 import DISK_LAYOUTS, Form, Table, layout_table
from erniekit.checkpoint.folder import WEIGHT_FORMATS, Folder
from erniekit.checkpoint.hf_files import Entry, is_weight_file
from erniekit.checkpoint.manifest import write_manifest
from erniekit.checkpoint.save import (
    BF16_TAG,
    MAX_SHARD_BYTES,
    ORIGIN_FILE,
    Plan,
    copy_companions,
    finish,
    require_empty,
    staged,
    write_weights,
)
from erniekit.checkpoint.source import Source

_WORKERS = 2


@dataclass(frozen=True)
class Origin:
    """How a folder was stored before its conversion."""

    layout: str
    form: Form
    files: dict[str, dict[str, str]]  # file -> tensor -> format tag
    metadata: dict[str, dict[str, str]]  # file -> its safetensors metadata
    config_json: str
    converted_config_sha256: str = ""

    @property
    def tags(self) -> dict[str, str]:
        """The format tag of every tensor."""
        return {name: tag for tensors in self.files.values() for name, tag in tensors.items()}

    @classmethod
    def of(cls, folder: Folder) -> Origin:
        """How `folder` is stored now."""
        files: dict[str, dict[str, str]] = {}
        for name, file in folder.file_of.items():
            files.setdefault(file, {})[name] = folder.tag(name)
        metadata = {file: folder.metadata(file) for file in files}
        return cls(folder.layout, folder.form, files, metadata, folder.config_json.decode())

    @classmethod
    def beside(cls, folder: Folder) -> Origin | None:
        """The origin that an earlier conversion left in `folder`, if it did."""
        path = folder.path / ORIGIN_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_bytes())
            origin = cls(**{**values, "form": Form(**values["form"])})
            understood = origin.is_sound()
        except (ValueError, TypeError, KeyError, AttributeError):
            understood = False
        if not understood:
            notice(f"{path}: not understood; the conversion goes on without it.")
            return None
        return origin

    def is_sound(self) -> bool:
        """Whether this can be followed safely: it may have been read from a file that anyone wrote."""
        texts = [value for metadata in self.metadata.values() for value in metadata.values()]
        return (
            all(map(_is_weight_file, self.files))  # they become names in the output folder: never paths
            and self.metadata.keys() == self.files.keys()
            and set(self.tags.values()) <= WEIGHT_FORMATS.keys()
            and len(self.tags) == sum(map(len, self.files.values()))  # no tensor twice
            and all(isinstance(text, str) for text in [self.config_json, *texts])
        )

    def write(self, path: Path, *, converted_config: bytes) -> None:
        """Leave this record beside a converted model whose config.json is `converted_config`."""
        write_json(path, asdict(self) | {"converted_config_sha256": hashlib.sha256(converted_config).hexdigest()})


def _is_weight_file(name: str) -> bool:
    return is_weight_file(name) or (name.endswith(".pdparams") and "/" not in name)


def convert(src: str | Path, dst: str | Path, *, to: str, max_shard_bytes: int | None = None) -> None:
    """Write the model in `src` (any layout) into `dst` (absent or empty) in layout `to`: "pt" or "paddle".

    Weights keep their precision, except that routers and correction biases become fp32. All that is stored is kept.
    Without `max_shard_bytes`, converting back gives the original files.
    """
    if to not in DISK_LAYOUTS:
        raise CheckpointError(f"unknown layout '{to}'; {' and '.join(DISK_LAYOUTS)} are known.")
    require_empty(dst)
    folder = Folder.open(src)
    folder.check()
    for text in folder.notices:
        notice(text)
    crossing = folder.layout != to
    origin = Origin.beside(folder) if crossing else Origin.of(folder)
    if origin is not None and (origin.layout != to or not origin.form.holds_as(folder.form)):
        origin = None
    write_converted(dst, folder, to=to, source=folder, origin=origin, max_shard_bytes=max_shard_bytes)


def write_converted(
    dst: str | Path, folder: Folder, *, to: str, source: Source, origin: Origin | None = None,
    max_shard_bytes: int | None = None, last: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write the atoms of `source` as a folder in layout `to`; all else as `folder` has it. `last` sees the folder when
    it is whole and has not appeared yet: it may add files, or raise, and then nothing appears."""
    plan = _plan(folder, to=to, origin=origin, max_shard_bytes=max_shard_bytes)
    with staged(dst) as stage:
        digests = write_weights(stage, plan, source, workers=_WORKERS)
        copy_companions(folder.path, stage)
        config = _config(folder, to=to, origin=origin)
        if folder.layout != to:
            Origin.of(folder).write(stage / ORIGIN_FILE, converted_config=config)
        finish(stage, config=config, digests=digests)
        if last is not None:
            last(stage)
            write_manifest(stage, known=digests)


def _config(folder: Folder, *, to: str, origin: Origin | None) -> bytes:
    """config.json for the new folder: the original one where nothing was changed since, else converted."""
    if folder.layout == to:
        return folder.config_json
    if origin and origin.converted_config_sha256 == hashlib.sha256(folder.config_json).hexdigest():
        return origin.config_json.encode()
    return (json.dumps(folder.disk_config.to_dict(to), indent=2, ensure_ascii=False) + "\n").encode()


def _plan(folder: Folder, *, to: str, origin: Origin | None, max_shard_bytes: int | None) -> Plan:
    cfg = folder.disk_config
    table = layout_table(cfg, to, origin.form if origin else folder.form.in_layout(cfg, to))
    if origin and origin.tags.keys() != table.tensors.keys():
        notice(f"{folder.path / ORIGIN_FILE}: names other tensors than this folder makes; it is not used.")
        origin = None
    tags = _tags(folder, table, to=to, origin=origin)
    if origin is None or max_shard_bytes is not None or not all(map(is_weight_file, origin.files)):
        return Plan.new(table, tags, layout=to, max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES)
    shards = {
        file: [Entry(name, tags[name], table.tensors[name].shape) for name in names]
        for file, names in origin.files.items()
    }
    return Plan(table, shards, origin.metadata)


def _tags(folder: Folder, table: Table, *, to: str, origin: Origin | None) -> dict[str, str]:
    """The format of each tensor: as precise as its most precise part, or as it was originally if that loses nothing."""
    original = origin.tags if origin else {}
    tags, rounded = {}, []
    for name, tensor in table.tensors.items():
        atoms = [atom for atom, _ in tensor.parts]
        exact = any(folder.tag(folder.table.places[atom].tensor) == "F32" for atom in atoms)
        tags[name] = "F32" if exact or any(table.atoms[atom].fp32 for atom in atoms) else BF16_TAG[to]
        if original and original[name] != tags[name]:
            wanted = original[name]
            narrower = exact and WEIGHT_FORMATS.get(wanted) == "bfloat16"
            if narrower and not all(_fits_bfloat16(folder, atom) for atom in atoms):
                rounded.append(name)
            else:
                tags[name] = wanted
    if rounded:
        notice(
            f"{len(rounded)} tensor(s) were bfloat16 originally and hold finer values now; they stay fp32 "
            f"('{rounded[0]}' ...)."
        )
    return tags


def _fits_bfloat16(folder: Folder, atom: str) -> bool:
    bits = np.ascontiguousarray(folder.read(atom)).view(np.uint32)
    fits = not np.any(bits & 0xFFFF)
    folder.release(atom)
    return fits
