"""What a run knows beside its log: how things were before training, and when its lives began.

Kept in `output_dir/training/story.json` from the moment that it is known, so that a run that was cut tells the same in
the end. Nothing of it enters training or what a resumed run is compared by.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from erniekit.base.files import write_json, writing

_FILE = "training/story.json"


def now() -> str:
    """The time for people."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def told(output_dir: Path) -> dict[str, Any]:
    """What a run has told so far."""
    path = output_dir / _FILE
    return json.loads(path.read_bytes()) if path.is_file() else {}


class Story:
    """Facts by name, written at once."""

    def __init__(self, output_dir: Path, *, start_step: int, writes: bool = True) -> None:
        """A new life of the run begins after `start_step`; the first one forgets what lies there. Of several ranks one
        `writes`."""
        self._path, self._writes = output_dir / _FILE, writes
        self._facts = told(output_dir) if start_step else {}
        with writing(self._path):
            self._path.parent.mkdir(exist_ok=True)
        self.tell(lives=[*self.get("lives", ()), {"step": start_step, "at": now()}])

    def get(self, name: str, default: Any = None) -> Any:
        """A fact, or `default` if it is not known."""
        return self._facts.get(name, default)

    def tell(self, **facts: Any) -> None:
        """Add facts."""
        self._facts |= facts
        if self._writes:
            write_json(self._path, self._facts)


def canary_problem(story: Story | dict[str, Any], most: float | None) -> str:
    """What is wrong if the canary's loss rose by more than the share `most` of the loss before; else an empty text."""
    before, after = story.get("canary_before"), story.get("canary_after")
    if most is None or before is None or after is None or after <= before * (1 + most):
        return ""
    return (
        f"forgetting: the loss on canary_dataset_path rose from {before:.4f} to {after:.4f}, by "
        f"{after / before - 1:.1%}; canary_max_increase allows {most:.1%}."
    )
