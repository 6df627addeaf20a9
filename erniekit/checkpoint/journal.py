"""What a long export has brought to the disk, so that one that is killed goes on where it was.

Knows nothing of what is exported: tensors and files are names here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from erniekit.base.console import notice
from erniekit.base.files import writing
from erniekit.checkpoint.save import JOURNAL, STAGE, require_empty


class Journal:
    """What is done, a JSON object a line: the first says which export this is, the others what is on the disk."""

    def __init__(self, stage: Path, export: str) -> None:
        self.path = stage / JOURNAL
        self.rows: dict[str, dict[str, Any]] = {}  # by tensor
        self.digests: dict[str, str] = {}  # by file
        self.whole = False  # nothing is left but to move the files
        lines = self._lines()
        self.goes_on = bool(lines) and lines[0].get("export") == export
        self.is_other = bool(lines) and not self.goes_on
        for line in lines[1:] if self.goes_on else ():
            self.rows |= {row["tensor"]: row for row in line.get("rows", ())}
            self.digests |= line.get("digests", {})
            self.whole |= line.get("whole", False)
        self._export = export

    def _lines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ValueError):  # a line that a kill cut
                found.append(json.loads(line))
        return found

    def begin(self) -> None:
        """Start anew."""
        self._append({"export": self._export}, mode="w")

    def add(self, **line: Any) -> None:
        """Note what is on the disk now."""
        self.rows |= {row["tensor"]: row for row in line.get("rows", ())}
        self.digests |= line.get("digests", {})
        self._append(line, mode="a")

    def _append(self, line: Mapping[str, Any], *, mode: str) -> None:
        with open(self.path, mode, encoding="utf-8") as file:
            if mode == "a" and not self._ends_whole():
                file.write("\n")
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"


@contextlib.contextmanager
def resumable(target: Path, export: str) -> Iterator[tuple[Path, Journal]]:
    """The hidden folder inside `target` with its journal: kept where the process is stopped, removed by an error."""
    stage = target / STAGE
    with writing(target):
        journal = Journal(stage, export)
        if not journal.whole:
            require_empty(target)
        if journal.is_other:
            notice(f"{target}: an export with other settings was not finished there; it is dropped.")
        created = [parent for parent in (target, *target.parents) if not parent.exists()]
        if not journal.goes_on:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            journal.begin()
        try:
            yield stage, journal
        except Exception:
            shutil.rmtree(stage, ignore_errors=True)
            for parent in [target] if journal.goes_on else created:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
