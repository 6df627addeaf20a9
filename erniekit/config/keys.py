"""What one key of the run file is: type, default, effect, and what may stand in it.

Knows how to declare and describe a key; knows no particular key (those are in the section files beside this one) and
reads no file.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

RESULTS, SPEED, INERT = "results", "speed", "inert"
_SAME = object()


@dataclass(frozen=True)
class Alias:
    """Another name for a key. `means` says for each value which values of the key agree with it, the one that it
    stands for first; an empty tuple says nothing. Without `means` the two names take the same values."""

    name: str
    kind: Any = None
    means: Mapping[Any, tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Key:
    """One key: where it lives, what it takes, what it does.

    effect   results: the outcome depends on it | speed: only time, memory or layout | inert: nothing, ever
    built    whether this version acts on it
    choices  the values that this version acts on; `later` are known and not built yet; `spellings` maps other words
    idle     further values that ask for nothing (None always does; False does unless the default is True)
    only     (key, values): the key has an effect only if that key has one of these values
    told_by  a key that, where it is set, says instead of the default what this one is
    there    ERNIEKit's default, where ours differs on purpose
    resume   fixed: may not change when a run is resumed | free: may
    """

    name: str
    section: str
    kind: Any
    default: Any
    doc: str
    effect: str = RESULTS
    built: bool = True
    choices: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[Alias, ...] = ()
    idle: tuple[Any, ...] = ()
    only: tuple[str, tuple[Any, ...]] | None = None
    told_by: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    there: Any = _SAME
    resume: str = "fixed"
    secret: bool = False

    @property
    def differs(self) -> bool:
        """Whether our default is another one than ERNIEKit's."""
        return self.there is not _SAME

    @property
    def fixed_on_resume(self) -> bool:
        """Whether a run must be resumed with the same value."""
        return self.effect == RESULTS and self.resume == "fixed"

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether setting the key to `value` is the same as not using what it offers."""
        return value is None or (value is False and self.default is not True) or value in self.idle

    def lacks(self, value: Any) -> bool:
        """Whether `value` asks for something that this version does not do."""
        if self.later:
            return any(item in self.later for item in (value if isinstance(value, list) else [value]))
        return not (self.built or self.asks_for_nothing(value) or value == self.default)


def key(default: Any, doc: str, **facts: Any) -> Any:
    """Declare a key as a dataclass field; `facts` are fields of `Key`."""
    return dataclasses.field(default=default, metadata={"doc": doc, **facts})


def later(default: Any, doc: str, **facts: Any) -> Any:
    """A key that changes results and is not built yet; its default asks for nothing."""
    return key(default, doc, built=False, **facts)


def speed(default: Any, doc: str, **facts: Any) -> Any:
    """A key about speed, memory or layout that is accepted and not acted on."""
    return key(default, doc, effect=SPEED, built=False, **facts)


def inert(default: Any, doc: str, **facts: Any) -> Any:
    """A key that has no effect here: the doc says what happens instead."""
    return key(default, doc, effect=INERT, built=False, **facts)


def keys_of(section: str, owner: type) -> dict[str, Key]:
    """The keys that the section dataclass `owner` declares."""
    return {
        field.name: Key(field.name, section, field.type, field.default, **field.metadata)
        for field in dataclasses.fields(owner)
    }


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union type, or the type itself."""
    return get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
