"""The reference of all keys as Markdown, made from their declarations.

`python -m erniekit.config.reference > docs/keys.md` writes the page anew; a test compares it.
"""

from __future__ import annotations

from erniekit.config.keys import INERT, Key
from erniekit.config.run import KEYS, SECTIONS
from erniekit.config.values import text_of, wanted

_INTRODUCTION = """\
# The keys of a config file

Made from the declarations in `erniekit/config/` by `python -m erniekit.config.reference`; do not edit.

A config file is flat YAML: `key: value` lines. `extends: base.yaml` in a file takes over the keys of a base, which may
not extend another; `key=value` words behind the file win over both. `None` and `null` mean nothing, `1` and `true` the
same for a switch, a list may be written with commas, quotes around a value make no difference.

**Effect**: *results* changes what is trained or answered; *speed* only time, memory or layout; *none* nothing, what
happens instead is said. A key that is **not built** is accepted while its value asks for nothing; beyond that, one with
an effect on results is refused and one about speed is named in a notice."""


def markdown() -> str:
    """The whole page."""
    lines = [_INTRODUCTION]
    for section, owner in SECTIONS.items():
        lines += ["", f"## {section}", "", owner.__doc__ or "", ""]
        lines += ["| key | type | default | what it does | effect |", "|---|---|---|---|---|"]
        lines += [_row(key) for key in KEYS.values() if key.section == section]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", wanted(key.kind), _default(key), _what(key), _effect(key))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: Key) -> str:
    there = f" (ERNIEKit: {text_of(key.there)})" if key.differs else ""
    return text_of(key.default) + there


def _what(key: Key) -> str:
    parts = [key.doc]
    if key.choices:
        parts.append(f"One of {', '.join(key.choices)}.")
    if key.later:
        parts.append(f"Not built yet: {', '.join(key.later)}.")
    if key.only:
        parts.append(f"Only with {key.only[0]} {' or '.join(text_of(value) for value in key.only[1])}.")
    if key.aliases:
        parts.append(f"Also written {', '.join(f'`{alias.name}`' for alias in key.aliases)}.")
    return " ".join(parts)


def _effect(key: Key) -> str:
    if key.effect == INERT:
        return "none"
    return key.effect if key.built else f"{key.effect}; not built"


if __name__ == "__main__":
    print(markdown(), end="")
