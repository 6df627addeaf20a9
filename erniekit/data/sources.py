"""From what a config names to samples: dialogues for SFT, answers to prompts for preferences, texts for pre-training.

A source is one file with the format of its rows and its share in the mixture; a glob stands for several, the name of a
data set for the files that `datasets` keeps of it. Every sample has a name, `file:line`. Rows that cannot be used go to
a report. Knows no tokens.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from erniekit.base.console import notice
from erniekit.base.errors import ConfigError, DataError, did_you_mean
from erniekit.config.data import is_data_set
from erniekit.data.chat import Dialogue
from erniekit.data.fields import Format, MissingColumn, guess_kind, kind_of_value
from erniekit.data.hub import data_set_files, is_data_set_folder
from erniekit.data.lines import BadRow, Part
from erniekit.data.preference_rows import JUDGED_FORMATS, PAIR_FORMATS
from erniekit.data.preferences import Answers
from erniekit.data.readers import TABLES, columns_of, parts_of, read_rows
from erniekit.data.rows import FORMATS

_KINDS = {
    "SFT": ("chatml", "erniekit", "alpaca"), "PT": ("text", "erniekit"),
    "DPO": tuple(PAIR_FORMATS), "RM": tuple(PAIR_FORMATS), "KTO": tuple(JUDGED_FORMATS),
}  # fmt: skip
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".xlsx")
_NUM_SHOWN = 20


@dataclass(frozen=True)
class Source:
    """One data file, its share in random mixing, and how its rows are read."""

    path: str
    weight: float = 1.0
    kind: str = ""  # a format of rows.py; empty: erniekit
    columns: tuple[tuple[str, str], ...] = ()  # our column and the file's, where they differ
    name: str = ""  # how messages call it, if not by its path

    def __str__(self) -> str:
        return self.name or self.path

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return Path(self.path).stat().st_size


@dataclass(frozen=True)
class Sample:
    """What a row says, and the line where it stands."""

    line: int
    content: Dialogue | Answers | str
    num_bytes: int


@dataclass
class RowReport:
    """What the rows of all files gave rise to; `bad` are (file:line, reason)."""

    bad: list[tuple[str, str]] = field(default_factory=list)
    unused_keys: set[str] = field(default_factory=set)

    @property
    def num_bad(self) -> int:
        """How many rows cannot be used."""
        return len(self.bad)

    def add(self, name: str, reason: str) -> None:
        """Note a bad row."""
        self.bad.append((name, reason))

    def raise_if_bad(self) -> None:
        """Refuse the data if any row is bad."""
        if self.bad:
            shown = [f"{name}: {reason}" for name, reason in self.bad[:_NUM_SHOWN]]
            rest = [f"... and {self.num_bad - _NUM_SHOWN} more"] if self.num_bad > _NUM_SHOWN else []
            rows = "row is" if self.num_bad == 1 else "rows are"
            raise DataError([f"{self.num_bad} data {rows} not usable; correct or remove:", *shown, *rest])


def list_sources(
    paths: Sequence[str] | None,
    kinds: Sequence[str] | None,
    weights: Sequence[float] | None,
    *,
    stage: str,
    key: str,
    columns: Mapping[str, str] | None = None,
) -> list[Source]:
    """The files named by `{key}_path`, `{key}_type` and `{key}_prob`, checked together; `key` is for the messages.

    `columns` maps our column names to those of the files, for every format that has such a column. A glob's weight is
    shared among its files by their size.
    """
    if not paths:
        raise ConfigError(f"{key}_path is not set: name one or several data files.")
    _check_settings(paths, kinds, weights, stage=stage, key=key)
    named = {ours: str(name) for ours, name in (columns or {}).items()}  # a name may look like a number
    problems: list[str] = []
    sources: list[Source] = []
    for position, path in enumerate(paths):
        kind = kinds[position % len(kinds)] if kinds else None
        weight = weights[position % len(weights)] if weights else 1.0
        found = _files_of(path, key=key, problems=problems)
        num_bytes = [max(Path(file).stat().st_size, 1) for file, _ in found]
        for (file, name), size in zip(found, num_bytes, strict=True):
            share = weight * (size / sum(num_bytes))
            sources.append(Source(file, share, _kind(file, kind, stage, named), name=name))
    if problems:
        raise DataError(problems)
    return _with_columns(sources, named, stage=stage, key=key)


def parts(source: Source, size: int) -> list[Part | None]:
    """Parts of about `size` bytes that `read_samples` reads one by one; [None] where the file is read at once."""
    return parts_of(source.path, size)


def read_samples(source: Source, report: RowReport, *, stage: str, part: Part | None = None) -> Iterator[Sample]:
    """The samples of a file, or of a part of it; bad rows go to the report."""
    found = _format(source, stage)
    theirs = dict(source.columns)
    wanted = {*found.columns, *theirs.values()}
    if source.path.endswith(TABLES):
        report.unused_keys.update(set(columns_of(source.path)) - wanted)
    if source.path.endswith(".txt") and stage != "PT":
        report.add(f"{source}:1", f"a .txt file holds no dialogues; stage {stage} reads rows")
        return
    for raw in read_rows(source.path, part, columns=wanted):
        try:
            row = raw.value
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"a row must be a JSON object, not {kind_of_value(row)}")
            if theirs:
                row = _renamed(row, theirs)
            yield Sample(raw.number, found.parse(row, report.unused_keys), raw.num_bytes)
        except MissingColumn as error:
            report.add(f"{source}:{raw.number}", f"{error}{_other_kind(source, row, stage)}")
        except BadRow as error:
            report.add(f"{source}:{raw.number}", str(error))


def _check_settings(
    paths: Sequence[str], kinds: Sequence[str] | None, weights: Sequence[float] | None, *, stage: str, key: str
) -> None:
    problems = []
    for name, values in (("type", kinds), ("prob", weights)):
        if values and len(values) not in (1, len(paths)):
            problems.append(f"{key}_{name} has {len(values)} values, but {key}_path has {len(paths)}; give one each.")
    for kind in dict.fromkeys(kinds or ()):
        if kind not in _KINDS[stage]:
            known = " or ".join(f"'{name}'" for name in _KINDS[stage])
            hint = did_you_mean(kind, _KINDS[stage])
            problems.append(f"{key}_type '{kind}' is not for stage {stage}, which reads {known}.{hint}")
    if weights and (min(weights) < 0 or sum(weights) <= 0):
        problems.append(f"{key}_prob {list(weights)} must not be negative, nor all zero.")
    if problems:
        raise ConfigError(problems)


def _files_of(path: str, *, key: str, problems: list[str]) -> list[tuple[str, str]]:
    """The files that an entry of `{key}_path` stands for, each with the name for messages if that is another."""
    file = Path(path)
    folder = file if file.exists() else Path(path.rpartition(":")[0] or path)
    if folder.is_dir() and not is_data_set_folder(folder):
        problems.append(f"{path}: is a folder; {key}_path names files: {path.rstrip('/')}/*.jsonl takes those in it.")
    elif folder.is_dir() or (is_data_set(path) and not file.exists()):
        found = data_set_files(path, key=key)
        return [(inner, path if len(found) == 1 else f"{path}/{number}") for number, inner in enumerate(found, 1)]
    elif file.is_file():
        return [(path, "")] if _may_be_read(path, key=key, problems=problems) else []
    else:
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if found:
            return [(name, "") for name in found if _may_be_read(name, key=key, problems=problems)]
        nothing = "no file matches this pattern" if glob.has_magic(path) else "there is no such file"
        problems.append(f"{path}: {nothing} ({key}_path).")
    return []


def _may_be_read(path: str, *, key: str, problems: list[str]) -> bool:
    if not os.access(path, os.R_OK):
        problems.append(f"{path}: may not be read by this user ({key}_path).")
    elif path.endswith(_PACKED):
        problems.append(f"{path}: unpack it first; {Path(path).suffix} files are not read.")
    else:
        return True
    return False


def _kind(path: str, kind: str | None, stage: str, columns: Mapping[str, str]) -> str:
    """The format of a file's rows: as the config says, or else as its first row looks, its columns renamed."""
    if stage == "PT" or kind:
        return kind or "text"
    present = columns_of(path, num_rows=1)
    for name in _KINDS[stage]:
        found = _formats(stage)[name]
        renamed = {found.synonyms.get(ours, ours) for ours, theirs in columns.items() if theirs in present}
        if columns and renamed <= found.columns and found.is_met_by({*present, *renamed}):
            return name
    return guess_kind(_formats(stage), present) or "erniekit"


def _formats(stage: str) -> Mapping[str, Format]:
    return {"DPO": PAIR_FORMATS, "RM": PAIR_FORMATS, "KTO": JUDGED_FORMATS}.get(stage, FORMATS)


def _format(source: Source, stage: str) -> Format:
    """How a source is read."""
    return _formats(stage)[_kind_read(source, stage)]


def _kind_read(source: Source, stage: str) -> str:
    """The format of a source. Rows of pre-training text are called `erniekit` in ERNIEKit's files too."""
    return "text" if stage == "PT" else source.kind or "erniekit"


def _other_kind(source: Source, row: Mapping[str, object], stage: str) -> str:
    """What a row looks like that lacks a column of its format."""
    kind, other = _kind_read(source, stage), guess_kind(_formats(stage), row)
    return f"; it looks like {other}, and the file is read as {kind}" if other not in (None, kind) else ""


def _with_columns(sources: list[Source], columns: Mapping[str, str], *, stage: str, key: str) -> list[Source]:
    """The sources with the part of the column map that concerns each: a file that has our name already needs none.

    Refuses a map that fits nowhere, and tables without the columns that their format needs.
    """
    problems = []
    mapped = []
    formats = [_format(source, stage) for source in sources]
    known = {name for found in formats for name in (*found.columns, *found.synonyms)}
    for ours in columns.keys() - known:
        problems.append(
            f"columns: '{ours}' is no column of ours ({', '.join(sorted(known))}); write {{our name: the file's name}}."
            f"{did_you_mean(ours, known)}"
        )
    for source, found in zip(sources, formats, strict=True):
        is_table = source.path.endswith((*TABLES, ".csv", ".tsv"))
        present = columns_of(source.path) if columns or is_table else []
        theirs = {}
        for ours, name in columns.items():
            column = found.synonyms.get(ours, ours)
            if column in found.columns and name in present:
                theirs[column] = name
            elif column in present:
                notice(f"{source}: has no column '{name}' and has '{column}' already; columns: {ours} is not used.")
            elif column in found.columns:
                problems.append(
                    f"{source}: has no column '{name}' (columns: {{{ours}: {name}}}, {key}_path); it has "
                    f"{', '.join(present) or 'none'}.{did_you_mean(name, present)}"
                )
        names = {*present, *theirs}
        if is_table and not problems and not found.is_met_by(names):
            needed = " or ".join(", ".join(names) for names in found.required)
            problems.append(
                f"{source}: the columns {needed} are missing; it has {', '.join(present) or 'none'}. Set "
                f"{key}_type, or map them with columns: {{our name: the file's name}}."
            )
        mapped.append(replace(source, columns=tuple(theirs.items())))
    if problems:
        raise DataError(problems)
    return mapped


def _renamed(row: Mapping[str, object], theirs: Mapping[str, str]) -> dict[str, object]:
    """The row under our column names."""
    taken = {ours: row[name] for ours, name in theirs.items() if name in row}
    return {name: value for name, value in row.items() if name not in theirs.values()} | taken
