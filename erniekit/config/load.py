"""Makes a RunConfig out of a file (or a mapping) and overrides. Finds everything that is wrong before it gives up.

Precedence: overrides, then the file, then the base that it extends, then the default. Within one of these a key and its
aliases must agree; between them the stronger one wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any

from erniekit.base.errors import ConfigError, did_you_mean
from erniekit.config import reader, rules
from erniekit.config.keys import Key
from erniekit.config.reader import Entry
from erniekit.config.run import ALIASES, DEFAULT, KEYS, SECTIONS, RunConfig
from erniekit.config.values import Mismatch, Raw, is_nothing, parse, text_of, wanted

EXTENDS = "extends"


def load_config(
    source: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """Read, check and resolve a configuration. Raises ConfigError with every problem found."""
    path = None if isinstance(source, Mapping) else Path(source)
    draft = _Draft()
    for layer in _layers(source, overrides, draft.problems):
        draft.add(layer)
    draft.settle()
    rules.fill_defaults(draft.values, draft.origins)
    sections = {
        section: owner(**{name: draft.values[name] for name, key in KEYS.items() if key.section == section})
        for section, owner in SECTIONS.items()
    }
    config = RunConfig(**sections, origins=draft.origins, path=path)
    draft.problems += rules.problems(config, draft.failed)
    if draft.problems:
        raise ConfigError(draft.problems)
    return dataclasses.replace(config, notices=tuple(rules.notices(config)))


def _layers(
    source: str | PathLike[str] | Mapping[str, Any],
    overrides: Iterable[str] | Mapping[str, Any],
    problems: list[str],
) -> list[list[Entry]]:
    """The entries of the base, the file and the overrides, weakest first."""
    if isinstance(source, Mapping):
        own, folder = reader.read_mapping(source, problems), Path()
    else:
        own, folder = reader.read_file(Path(source)), Path(source).parent
    return [
        *_bases([entry for entry in own if entry.name == EXTENDS], folder, problems),
        [entry for entry in own if entry.name != EXTENDS],
        _last(overrides, problems),
    ]


def _bases(extending: list[Entry], folder: Path, problems: list[str]) -> Iterator[list[Entry]]:
    for entry in extending[:1]:
        if not isinstance(entry.raw, str) or is_nothing(entry.raw):
            problems.append(f"{entry.origin}: {EXTENDS} wants the path of one file")
            continue
        try:
            base = reader.read_file(folder / entry.raw)
        except ConfigError as error:
            problems += [f"{entry.origin}: {EXTENDS}: {problem}" for problem in error.problems]
            continue
        problems += [
            f"{further.origin}: a base may not extend another file ({entry.origin} extends it); "
            "write the keys into one of the two"
            for further in base
            if further.name == EXTENDS
        ]
        yield [Entry(e.name, e.raw, f"{EXTENDS} {e.origin}") for e in base if e.name != EXTENDS]
    problems += [f"{entry.origin}: {EXTENDS} stands a second time; a file has one base" for entry in extending[1:]]


def _last(overrides: Iterable[str] | Mapping[str, Any], problems: list[str]) -> list[Entry]:
    if isinstance(overrides, Mapping):
        entries = reader.read_mapping(overrides, problems)
    else:
        entries = reader.read_words(overrides, problems)
    problems += [f"{entry.origin}: {EXTENDS} belongs into a file" for entry in entries if entry.name == EXTENDS]
    return [entry for entry in entries if entry.name != EXTENDS]


@dataclass(frozen=True)
class _Statement:
    """What one entry says about a key: the values that it agrees with, the one it stands for first."""

    entry: Entry
    values: tuple[Any, ...]


@dataclass
class _Draft:
    """Values and origins as they are found. `said` is what the layers so far say about each key; `failed` are keys
    whose value could not be read."""

    values: dict[str, Any] = field(default_factory=lambda: {name: key.default for name, key in KEYS.items()})
    origins: dict[str, str] = field(default_factory=lambda: dict.fromkeys(KEYS, DEFAULT))
    said: dict[str, list[_Statement]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def add(self, layer: list[Entry]) -> None:
        """Let a layer overrule the weaker ones: what they say under its names, and what does not agree with it."""
        said: dict[str, list[_Statement]] = {}
        first: dict[str, Entry] = {}
        for entry in layer:
            earlier = first.setdefault(entry.name, entry)
            if earlier is not entry:
                self.problems.append(f"{entry.origin}: {entry.name} stands a second time, first at {earlier.origin}")
            self._read(entry, said)
        for name, statements in self.said.items():
            weaker = [s for s in statements if s.entry.name not in first]
            together = [*said.get(name, ()), *weaker]
            if name not in said or _common(together) is not _NOTHING:
                said[name] = together
        self.said = said

    def _read(self, entry: Entry, said: dict[str, list[_Statement]]) -> None:
        try:
            if entry.name in KEYS:
                key = KEYS[entry.name]
                agreeing: tuple[Any, ...] = (_value(entry, key, key.kind),)
            elif entry.name in ALIASES:
                key, alias = ALIASES[entry.name]
                agreeing = (_value(entry, key, alias.kind or key.kind),)
                if alias.means is not None:
                    agreeing = _meaning(entry, agreeing[0], alias.means)
            else:
                known = [*KEYS, *ALIASES, EXTENDS]
                raise ConfigError(f"{entry.origin}: unknown key '{entry.name}'.{did_you_mean(entry.name, known)}")
        except ConfigError as error:
            self.problems += error.problems
            self.failed.add(ALIASES[entry.name][0].name if entry.name in ALIASES else entry.name)
            return
        if agreeing:
            said.setdefault(key.name, []).append(_Statement(entry, agreeing))

    def settle(self) -> None:
        """Find the value of every key that something was said of."""
        for name, statements in self.said.items():
            if statements:
                self._settle(name, statements)

    def _settle(self, name: str, statements: list[_Statement]) -> None:
        statements = sorted(statements, key=lambda statement: statement.entry.name != name)  # its own name leads
        value, leading = _common(statements), statements[0].entry
        if value is not _NOTHING:
            self.values[name] = value
            self.origins[name] = leading.origin + ("" if leading.name == name else f" ({leading.name})")
            return
        self.failed.add(name)
        one, other = next(pair for pair in combinations(statements, 2) if _common([*pair]) is _NOTHING)
        if one.entry.name != other.entry.name:  # a repetition was named before
            self.problems.append(
                f"{_quote(one.entry)} and {_quote(other.entry)} disagree: both set {name}. Delete one of them."
            )


_NOTHING = object()


def _common(statements: list[_Statement]) -> Any:
    """The value that all statements agree with, or _NOTHING."""
    values = statements[0].values if statements else ()
    return next((value for value in values if all(value in s.values for s in statements)), _NOTHING)


def _quote(entry: Entry) -> str:
    return f"{entry.name}: {_shown(entry.raw)} ({entry.origin})"


def _shown(raw: Raw) -> str:
    text = text_of(raw)
    return text if len(text) <= 80 else text[:77] + "..."


def _value(entry: Entry, key: Key, kind: Any) -> Any:
    """The typed value of an entry that belongs to `key`; raises ConfigError."""
    where = f"{entry.origin}: {entry.name}"
    if is_nothing(entry.raw) and key.there is None:
        return key.default  # null is ERNIEKit's way of leaving this key alone
    try:
        value = parse(entry.raw, kind)
    except Mismatch:
        raise ConfigError(f"{where}: {_shown(entry.raw)} is not {wanted(kind)}") from None
    if kind is not key.kind:
        return value
    value = [_word(item, key, where) for item in value] if isinstance(value, list) else _word(value, key, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(value, key, where)
    return value


def _word(value: Any, key: Key, where: str) -> Any:
    """The known word that `value` spells, whatever its case; other values as they are."""
    if not isinstance(value, str) or not (key.choices or key.later):
        return value
    known = {word.lower(): word for word in (*key.choices, *key.later)}
    known.update({spelling.lower(): word for spelling, word in key.spellings.items()})
    if value.lower() in known:
        return known[value.lower()]
    if not key.choices:
        return value
    raise ConfigError(
        f"{where}: '{value}' is not known.{did_you_mean(value, known.values())} "
        f"Known: {', '.join((*key.choices, *key.later))}."
    )


def _check_range(value: float, key: Key, where: str) -> None:
    if key.least is not None and value < key.least:
        raise ConfigError(f"{where}: {text_of(value)} is too small; it must be at least {text_of(key.least)}")
    if key.above is not None and value <= key.above:
        raise ConfigError(f"{where}: {text_of(value)} is too small; it must be above {text_of(key.above)}")
    if key.most is not None and value > key.most:
        raise ConfigError(f"{where}: {text_of(value)} is too large; it must be at most {text_of(key.most)}")


def _meaning(entry: Entry, value: Any, means: Mapping[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    if value in means:
        return means[value]
    known = [text_of(word) for word in means if word is not None]
    raise ConfigError(
        f"{entry.origin}: {entry.name}: '{value}' is not known.{did_you_mean(str(value), known)} "
        f"Known: {', '.join(known)}."
    )
