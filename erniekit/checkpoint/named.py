"""Tensors by parameter name on disk: optimizer states, averages and copies of weights, the adapter of a model.

Such a file holds whole tensors, [in, out] and stacked as a model in memory has them, whatever the layout of the ranks
that wrote it: the parameters' names with the kind of state behind them, `model.norm.weight.moment1`. Every rank writes
and reads the numbers that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from erniekit.adapters.targets import slot_owner
from erniekit.base.errors import CheckpointError, listed
from erniekit.checkpoint.adapter import EXPERTS, weight_of
from erniekit.checkpoint.ernie45 import HEAD_BIAS, Atom, Place, Table, Tensor, memory_table
from erniekit.checkpoint.hf_files import Entry, SafetensorsFile
from erniekit.checkpoint.keys import View, expert, whole
from erniekit.checkpoint.pieces import Part, Span
from erniekit.checkpoint.together import File, SharedStage, Team, assigned, share_of, write_files
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.config.layout import Layout

_IN, _OUT, _BOTH = ("lora_A", "initial_A"), ("lora_B", "initial_B"), ("magnitude",)


# ---------------------------------------------------------------------- tables
def parameter_table(cfg: ErnieConfig, shapes: Mapping[str, Sequence[int]], *, cut: Cut = WHOLE) -> Table:
    """The parameters of these names, adapters too, as far as `cut` holds them. Of the shapes only the ranks of adapters
    count, which nobody cuts."""
    memory, table = memory_table(cfg, head_bias=HEAD_BIAS in shapes, cut=cut), Table()
    for name, shape in shapes.items():
        if name in memory.tensors:
            tensor, held = memory.tensors[name], memory.held
            _add(table, name, tensor.shape, [(atom, view, held.get(atom, ())) for atom, view in tensor.parts])
        else:
            _add_adapter(table, name, memory, shape)
    return table


def _add(table: Table, name: str, shape: tuple[int, ...], parts: Iterable[tuple[str, View, tuple[slice, ...]]]) -> None:
    tensor = table.tensors.setdefault(name, Tensor(shape))
    for atom, view, held in parts:
        tensor.parts.append((atom, view))
        table.atoms[atom], table.places[atom] = Atom(shape), Place(name, view)
        if held:
            table.held[atom] = held


def _add_adapter(table: Table, name: str, memory: Table, shape: Sequence[int]) -> None:
    """A parameter of an adapter is cut like the weight beside it: A along its ins, B and magnitude along its outs."""
    path, _, kind = name.rpartition(".")
    target = slot_owner(path)
    weight = memory.tensors[weight_of(target)]
    stacked, parts = EXPERTS.fullmatch(target) is not None, []
    *experts, ins, outs = weight.shape
    if kind in _IN:
        size = len(weight.parts) // (experts[0] if stacked else 1)
        for number, (atom, _) in enumerate(weight.parts[::size]):
            held = memory.held.get(atom, ())
            parts.append((f"{atom}.{kind}", expert(number, whole) if stacked else whole, held[1:]))
        _add(table, name, (*experts, ins, shape[-1]), parts)
        return
    for atom, view in weight.parts:
        held = memory.held.get(atom, ())[:1]
        parts.append((f"{atom}.{kind}", view, held if held and held[0] != slice(None) else ()))
    _add(table, name, (outs,) if kind in _BOTH else (*experts, shape[-2], outs), parts)


def state_table(parameters: Table, keys: Iterable[str]) -> Table:
    """Of tensors that belong to parameters: `<parameter>.<kind>`, or `<owner>.<parameter>`."""
    table = Table()
    for key in keys:
        name = parameter_of(key, parameters)
        if name is not None:
            tensor, held = parameters.tensors[name], parameters.held
            parts = [(f"{key} {atom}", view, held.get(atom, ())) for atom, view in tensor.parts]
            _add(table, key, tensor.shape, parts)
    return table


def parameter_of(key: str, parameters: Table) -> str | None:
    """Which parameter a tensor has the shape of; None if of none, as a norm has."""
    if key in parameters.tensors:
        return key
    name, _, kind = key.rpartition(".")
    if name in parameters.tensors and kind != "norm":
        return name
    return next((rest for rest in (key.partition(".")[2],) if rest in parameters.tensors), None)


# ---------------------------------------------------------------------- files
@dataclass(frozen=True)
class Numbers:
    """A tensor that a rank has numbers of, fetched when it is asked for: its format, and its span where it has not all
    of its block."""

    fetch: Callable[[], np.ndarray]
    tag: str
    shape: tuple[int, ...] = ()  # of what belongs to no parameter
    span: Span | None = None

    def copied(self) -> Numbers:
        """The numbers as they are now."""
        array = np.array(self.fetch())
        return replace(self, fetch=lambda: array)


_Formats = dict[str, tuple[str, tuple[int, ...]]]  # of tensors that any rank has numbers of, the same on all ranks


def _spans(formats: _Formats, numbers: Mapping[str, Numbers]) -> dict[str, Span]:
    """What a rank has of tensors that it has not all of."""
    spans = dict.fromkeys(formats.keys() - numbers.keys(), (0, 0))
    return spans | {key: n.span for key, n in numbers.items() if n.span is not None}


class _Fetched(Mapping[str, np.ndarray]):
    def __init__(self, numbers: Mapping[str, Numbers]) -> None:
        self._numbers = numbers

    def __getitem__(self, key: str) -> np.ndarray:
        return self._numbers[key].fetch()

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@dataclass(frozen=True)
class Named:
    """The parameters that named tensors belong to, on this rank of a layout."""

    cfg: ErnieConfig
    shapes: Mapping[str, Sequence[int]]
    layout: Layout = field(default_factory=Layout)
    rank: int = 0

    def table(self, cut: Cut = WHOLE) -> Table:
        """What `cut` holds of the parameters."""
        return parameter_table(self.cfg, self.shapes, cut=cut)

    def write(self, stage: SharedStage, file: str, numbers: Mapping[str, Numbers]) -> dict[str, str]:
        """Write `file` below `stage` together with all other ranks, each with what it has; returns its sha256."""
        formats = self._formats(stage.team, numbers)
        table_of = functools.partial(self._table_of, formats)
        share = share_of(stage.team, table_of, _Fetched(numbers), spans=_spans(formats, numbers))
        everything = table_of(WHOLE)
        entries = [Entry(key, tag, everything.tensors[key].shape) for key, (tag, _) in formats.items()]
        return write_files(stage, {file: File(entries, everything)}, share)

    def copied(self, team: Team, numbers: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """The numbers as they are now, as far as `write` will ask this rank for them. All ranks of the team call it."""
        formats = self._formats(team, numbers)
        _, mine = assigned(team, functools.partial(self._table_of, formats), spans=_spans(formats, numbers))
        return {key: n.copied() if key in mine else n for key, n in numbers.items()}

    def _formats(self, team: Team, numbers: Mapping[str, Numbers]) -> _Formats:
        said = team.words.collect("named", {key: [n.tag, n.shape] for key, n in numbers.items()})
        return {key: (tag, tuple(shape)) for each in said for key, (tag, shape) in each.items()}

    def _table_of(self, formats: _Formats, cut: Cut) -> Table:
        table = state_table(self.table(cut), formats)
        for key in formats.keys() - table.tensors.keys():
            _add(table, key, formats[key][1], [(key, whole, ())])
        return table

    def read(self, path: Path, spans: Mapping[str, Span]) -> dict[str, np.ndarray]:
        """What this rank has of the tensors in `path`, of a parameter its span; tensors that belong to no parameter of
        these are whole."""
        file = SafetensorsFile(path)
        own, everything = self.table(Cut.of(self.layout, self.rank)), self.table()
        local, stored = state_table(own, file.tensors), state_table(everything, file.tensors)
        wrong = [
            f"{path}: '{key}' is {list(file.tensors[key].shape)}; this run wants {list(tensor.shape)}."
            for key, tensor in stored.tensors.items() if file.tensors[key].shape != tensor.shape
        ]  # fmt: skip
        if wrong:
            raise CheckpointError(listed(wrong))
        owners = {key: parameter_of(key, everything) or "" for key in stored.tensors}
        part = Part(local, {key: spans[name] for key, name in owners.items() if name in spans})
        found = {}
        for key in file.tensors:
            array = file.read(key)
            if key in stored.tensors:
                atoms = {atom: view(array) for atom, view in stored.tensors[key].parts}
                found[key] = part.filled(key, atoms, array.dtype)
            else:
                found[key] = np.array(array)
            file.release(key)
        return found
