"""Values of a row of data, checked, and what a format of rows is. Knows no particular format and no files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from erniekit.data.lines import BadRow

Row = Mapping[str, Any]


class MissingColumn(BadRow):
    """A row without a column that its format needs."""


@dataclass(frozen=True)
class Format:
    """How rows of one kind are read: what they hold, and what they must hold."""

    parse: Callable[[Row, set[str]], Any]  # the row's content; keys that are left aside are added to the set
    columns: frozenset[str]
    required: tuple[tuple[str, ...], ...]  # the columns of one of these must be there
    synonyms: Mapping[str, str]  # further names for its columns that a column map may use

    def is_met_by(self, columns: Collection[str]) -> bool:
        """Whether these columns are enough for it."""
        return any(all(column in columns for column in needed) for needed in self.required)


def guess_kind(formats: Mapping[str, Format], columns: Collection[str]) -> str | None:
    """The first of the formats that a row with these columns looks like."""
    return next((kind for kind, found in formats.items() if found.is_met_by(columns)), None)


def json_value(value: Any) -> Any:
    """A list or object that a table holds as JSON text; another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg}): {excerpt(value)}") from error


def flags(values: Any, key: str) -> list[int]:
    """A list of 0 and 1."""
    if not isinstance(values, list) or not all(isinstance(value, int) and value in (0, 1) for value in values):
        raise BadRow(f'"{key}" must be a list of 0 and 1, not {excerpt(values)}')
    return values


def optional(row: Row, key: str) -> str:
    """A string, empty where there is none."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f'"{key}" must be a string, not {kind_of_value(value)}')
    return value or ""


def string(row: Row, key: str) -> str:
    """A string that says something."""
    value = required(row, key, "a string")
    if not isinstance(value, str):
        raise BadRow(f'"{key}" must be a string, not {kind_of_value(value)}')
    if not value.strip():
        raise BadRow(f'"{key}" is empty')
    return value


def strings(row: Row, key: str) -> list[str]:
    """A list of strings that say something; one string stands for a list of one."""
    return string_list(required(row, key, "a list of strings"), f'"{key}"')


def string_list(values: Any, name: str) -> list[str]:
    """The same of a value; `name` is what messages call it."""
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list):
        raise BadRow(f"{name} must be a list of strings, not {kind_of_value(values)}")
    if not values:
        raise BadRow(f"{name} is empty")
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise BadRow(f"{name}[{position}] must be a string, not {kind_of_value(value)}")
        if not value.strip():
            raise BadRow(f"{name}[{position}] is empty")
    return values


def required(row: Row, key: str, what: str) -> Any:
    """The value of a column that must be there; `what` says what it should be."""
    if key in row:
        return row[key]
    found = ", ".join(f'"{name}"' for name in row) or "nothing"
    raise MissingColumn(f'"{key}" ({what}) is missing; the row has {_shortened(found)}')


def note_unused(row: Row, columns: frozenset[str], unused: set[str]) -> None:
    """Note the keys that the format has no use for."""
    if not row.keys() <= columns:
        unused.update(row.keys() - columns)


def kind_of_value(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def excerpt(value: Any) -> str:
    """A value as it is quoted in a message."""
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
