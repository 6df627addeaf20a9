"""Judges a model folder: checksums, index against shards, names and shapes against config.json. Changes nothing."""

from __future__ import annotations

from pathlib import Path

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.manifest import MANIFEST_FILE, check_manifest


def verify(path: str | Path) -> list[str]:
    """Everything that is missing, extra or corrupt in a model folder; empty if it is sound.

    Checksums are compared where a manifest.json lies beside the weights; published models have none.
    """
    problems = check_manifest(path) if (Path(path) / MANIFEST_FILE).is_file() else []
    try:
        Folder.open(path).check()
    except CheckpointError as error:
        problems += error.problems
    return problems
