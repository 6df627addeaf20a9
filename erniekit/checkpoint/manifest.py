"""manifest.json: the sha256 and size of every file that was written together, so that damage is seen later.

Used by model folders and by training checkpoints alike. Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from erniekit.base.files import sha256, write_json

MANIFEST_FILE = "manifest.json"


def write_manifest(
    folder: str | Path, names: Iterable[str] | None = None, *, known: Mapping[str, str] | None = None
) -> None:
    """Write `folder`/manifest.json over `names` (relative; by default every file below the folder that is not hidden).

    `known` holds digests that the writer computed already.
    """
    folder, known = Path(folder), known or {}
    if names is None:
        below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names = [path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts)]
    files = {
        name: {"sha256": known.get(name) or sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in sorted(set(names) - {MANIFEST_FILE})
    }
    write_json(folder / MANIFEST_FILE, {"files": files})


def check_manifest(folder: str | Path) -> list[str]:
    """What is wrong with the files that manifest.json lists (empty: all are whole). A missing manifest is a problem."""
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return [f"{path}: missing."]
    try:
        listed_files = json.loads(path.read_bytes())["files"]
        expected = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in listed_files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{path}: not a manifest (an object of 'files', each with 'sha256' and 'bytes')."]
    problems = []
    for name, (digest, num_bytes) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: missing, though {MANIFEST_FILE} lists it.")
        elif file.stat().st_size != num_bytes:
            problems.append(f"{file}: {file.stat().st_size} bytes; {MANIFEST_FILE} says {num_bytes}.")
        elif sha256(file) != digest:
            problems.append(f"{file}: its content is not what was written (sha256 differs from {MANIFEST_FILE}).")
    return problems
