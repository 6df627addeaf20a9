"""Judges a model folder, quantised or not: checksums, index against shards, names and shapes against config.json; and
an adapter folder, against its base too where that is at hand. Changes nothing."""

from __future__ import annotations

from pathlib import Path

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.manifest import MANIFEST_FILE, check_manifest
from erniekit.checkpoint.quantised_folder import QuantisedFolder, is_quantised


def verify(path: str | Path) -> list[str]:
    """Everything that is missing, extra or corrupt in a model or adapter folder; empty if it is sound.

    Checksums are compared where a manifest.json lies beside the weights; published models have none.
    """
    problems = check_manifest(path) if (Path(path) / MANIFEST_FILE).is_file() else []
    try:
        if is_adapter(path):
            _verify_adapter(AdapterFolder.open(path))
        elif is_quantised(path):
            QuantisedFolder.open(path).check()
        else:
            Folder.open(path).check()
    except CheckpointError as error:
        problems += error.problems
    return problems


def _verify_adapter(adapter: AdapterFolder) -> None:
    """Raise CheckpointError unless the adapter makes sense, and fits its base if that is a folder here."""
    if adapter.base_name and (Path(adapter.base_name) / "config.json").is_file():
        base = Folder.open(adapter.base_name)
        adapter.on(base.disk_config, mtp_layers=base.form.mtp_layers)
    adapter.require_finite()
