"""The one parser of values: what stands in a file, on the command line or in a Python call becomes one typed value.

A value comes in as its text (quotes make no difference), or as a list or mapping of such texts. Which key it belongs to
is none of this file's business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from os import PathLike
from types import NoneType
from typing import Any, get_args, get_origin

from erniekit.config.keys import members

_NOTHING = ("", "none", "null", "~")
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+-]*")
_LARGEST = 2**63

Raw = str | None | list["Raw"] | dict[str, "Raw"]


class Mismatch(ValueError):
    """The text is not of the wanted type."""


def raw(value: Any) -> Raw:
    """A Python value as the texts that a file would hold."""
    if value is None:
        return None
    if isinstance(value, str):
        return checked(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, PathLike):
        return checked(str(value))
    if isinstance(value, Mapping):
        return {checked(str(name)): raw(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [raw(item) for item in value]
    raise Mismatch(f"a setting cannot be of type {type(value).__name__}")


def checked(text: str) -> str:
    """`text`, unless it has what no file name or message can hold: NUL or half a character."""
    if "\0" in text or any(0xD800 <= ord(char) < 0xE000 for char in text):
        raise Mismatch("holds a character that is no text")
    return text


def parse(value: Raw, kind: Any) -> Any:
    """`value` as the type `kind`; raises Mismatch."""
    kinds = members(kind)
    if is_nothing(value):
        if NoneType in kinds:
            return None
        raise Mismatch
    for member in kinds:
        try:
            return _parse_one(value, member)
        except Mismatch:
            continue
    raise Mismatch


def is_nothing(value: Raw) -> bool:
    """Whether the text is one of the words for null."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _parse_one(value: Raw, kind: Any) -> Any:
    if kind is NoneType:
        raise Mismatch
    origin = get_origin(kind) or kind
    if origin is list:
        return _list(value, *get_args(kind))
    if origin is dict:
        return _dict(value)
    if not isinstance(value, str):
        raise Mismatch
    return _SCALARS[kind](value)


def _int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        real = _float(text)
        if real != int(real):
            raise Mismatch from None
        number = int(real)
    if abs(number) >= _LARGEST:
        raise Mismatch
    return number


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise Mismatch from None
    if not math.isfinite(number):
        raise Mismatch
    return number


def _bool(text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise Mismatch


_SCALARS: dict[Any, Callable[[str], Any]] = {int: _int, float: _float, bool: _bool, str: str}


def _list(value: Raw, kind: Any = Any) -> list[Any]:
    if isinstance(value, str):
        value = _structure(value) if value.lstrip().startswith("[") else _split(value)
    if not isinstance(value, list) or not value:
        raise Mismatch
    return [_natural(item) if kind is Any else parse(item, kind) for item in value]


def _split(text: str) -> list[Raw]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _dict(value: Raw) -> dict[str, Any]:
    if isinstance(value, str):
        value = _structure(value)
    if not isinstance(value, dict):
        raise Mismatch
    return {name: _natural(item) for name, item in value.items()}


def _structure(text: str) -> Raw:
    """JSON (or any flow-style YAML) that stands inside a string."""
    from erniekit.base.errors import ConfigError
    from erniekit.config.reader import read_text

    try:
        return read_text(text, "value")
    except ConfigError:
        raise Mismatch from None


def _natural(value: Raw) -> Any:
    """The value that the text looks like, where the key does not say."""
    if isinstance(value, list):
        return [_natural(item) for item in value]
    if isinstance(value, dict):
        return {name: _natural(item) for name, item in value.items()}
    if value is None or is_nothing(value):
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for read in (_int, _float):
        try:
            return read(value)
        except Mismatch:
            continue
    return value


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list",
           dict: "a mapping", NoneType: "null"}  # fmt: skip


def wanted(kind: Any) -> str:
    """The type in words, for messages and for the reference."""
    return " or ".join(_wanted_one(member) for member in members(kind))


def _wanted_one(kind: Any) -> str:
    if get_origin(kind) is list:
        return "a list of " + {str: "texts", float: "numbers", int: "whole numbers"}[get_args(kind)[0]]
    return _WANTED[kind]


def text_of(value: Any) -> str:
    """The value as a file would write it; `parse` reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(text_of(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{text_of(name)}: {text_of(item)}" for name, item in value.items()) + "}"
    return repr(value)
