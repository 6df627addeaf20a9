"""What the program says beside its results: one-line notices and warnings on stderr."""

from __future__ import annotations

import sys


def notice(text: str) -> None:
    """A fact that the user should know and need not act on."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something that probably needs the user's attention."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
