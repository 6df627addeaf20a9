"""A progress bar for work that is counted in bytes; silent where there is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class ByteProgress:
    """Call with (done, total) as often as you like, inside a `with`."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None

    def __enter__(self) -> ByteProgress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes are read."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=self._label, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
            )
        self._bar.update(done - self._bar.n)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> Any:
        if self._bar is not None:
            self._bar.close()
