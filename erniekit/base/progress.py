"""A progress bar for work whose amount is known, mostly in bytes; silent where there is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class ByteProgress:
    """Call with (done, total) as often as you like, inside a `with`; it shows rate and time left. `unit` is what is
    counted."""

    def __init__(self, label: str, *, unit: str = "B") -> None:
        self._label, self._unit = label, unit
        self._bar: Any = None

    def __enter__(self) -> ByteProgress:
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` are done; `note` stands behind the bar."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=self._label, unit=self._unit, unit_scale=True, leave=False,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> Any:
        if self._bar is not None:
            self._bar.close()
