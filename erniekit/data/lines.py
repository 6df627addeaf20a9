"""Text files by line, with line numbers; a byte order mark, CRLF, blank lines and a missing last newline do no harm.

Knows nothing of what a line means.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson


class BadRow(ValueError):
    """One row of a data file that can't be used; the message is the reason, without the place."""


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, without its line end, and its number from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, line


def decode_utf8(raw: bytes) -> str:
    """The text of a line; BadRow if it is no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not valid UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1})") from error


def decode_json(raw: bytes) -> Any:
    """The value of a line of JSON; BadRow if it isn't one."""
    text = decode_utf8(raw)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg} at column {error.colno})") from error
