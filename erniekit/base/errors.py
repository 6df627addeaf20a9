"""Errors that a user can act on. The command line prints them without a traceback and exits with code 2.

Our own mistakes are `assert` failures and ordinary exceptions: those keep their traceback and exit with code 1.
"""

from __future__ import annotations

from collections.abc import Iterable


class ErnieKitError(Exception):
    """One or several problems, each a sentence with names, values and the way out."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "an error must say what is wrong"
        super().__init__("\n".join(self.problems))


class ConfigError(ErnieKitError):
    """Something is wrong in a config file, an override or a command line."""


class DataError(ErnieKitError):
    """Something is wrong in a data file or a tokenizer."""


class CheckpointError(ErnieKitError):
    """Something is wrong in a folder of weights or of training state."""


class MeshError(ErnieKitError):
    """The requested parallel layout does not fit the model or the devices."""


class TrainingStopped(ErnieKitError):
    """Training cannot go on (a non-finite loss); what was saved before stands."""


class NotFinite(ErnieKitError):
    """NaN or infinity is about to be cast to a number format that has neither."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """" Did you mean 'x'?" for the nearest known name, or an empty string."""
    import difflib  # only an error path needs it

    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean '{lowered[near[0]]}'?" if near else ""


def listed(items: Iterable[str], *, limit: int = 20) -> list[str]:
    """The first `limit` items, and one line that counts the rest."""
    items = list(items)
    if len(items) <= limit:
        return items
    return [*items[:limit], f"... and {len(items) - limit} more"]
