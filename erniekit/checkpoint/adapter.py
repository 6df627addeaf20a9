"""A low-rank adapter as numbers: what it does to every atom of a model, and how it lies in the parameters of one.

An adapter is a pair A [in, rank], B [rank, out] per module, the same pair seen per atom as (rank_in, out_rank). Where
several atoms share one tensor (the gate and up projections of the experts in memory, q|k|v in ERNIEKit's form), their
pairs are fused: one pair of the same rank if all of them have the same A, else A side by side and B block-diagonal.
Both are exact. Knows no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from erniekit.adapters.targets import slot
from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.ernie45 import Table
from erniekit.config.adapter import AdapterConfig

EXPERTS = re.compile(r"(?P<head>.*\.experts)\.(?P<part>gate_up|down)_proj")
_ONE_EXPERT = re.compile(r"(?P<head>.*\.experts)\.\d+\.(?P<part>gate|up|down)_proj")


def target_of(module: str) -> str:
    """The module in memory that holds a module named as in -PT: the experts of a layer are one."""
    found = _ONE_EXPERT.fullmatch(module)
    return f"{found['head']}.{'down' if found['part'] == 'down' else 'gate_up'}_proj" if found else module


def weight_of(target: str) -> str:
    """The parameter in memory that a target's adapter stands beside."""
    return target if EXPERTS.fullmatch(target) else f"{target}.weight"


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one atom seen [out, in]: scaling * out_rank @ rank_in. DoRA (arXiv 2402.09353) then
    brings every row of the sum to the length that `magnitude` says."""

    rank_in: np.ndarray
    out_rank: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.rank_in.shape[0]

    def applied(self, weight: np.ndarray) -> np.ndarray:
        """The atom (float32 [out, in]) with the adapter in it."""
        merged = weight + np.float32(self.scaling) * (self.out_rank @ self.rank_in)
        if self.magnitude is not None:
            merged *= (self.magnitude / np.linalg.norm(merged, axis=1))[:, None]
        return merged

    def widened(self, rank: int, scaling: float) -> Factors:
        """The same adapter, written with another (not smaller) rank and another scaling."""
        if (rank, scaling) == (self.rank, self.scaling):
            return self
        rank_in = np.zeros((rank, self.rank_in.shape[1]), np.float32)
        out_rank = np.zeros((self.out_rank.shape[0], rank), np.float32)
        rank_in[: self.rank], out_rank[:, : self.rank] = self.rank_in, self.out_rank
        out_rank *= np.float32(self.scaling / scaling)
        return Factors(rank_in, out_rank, scaling, self.magnitude)


def shares_a(parts: Sequence[Factors]) -> bool:
    """Whether all have the same A (and scaling), so that fusing them keeps the rank."""
    first = parts[0]
    return all(part.scaling == first.scaling and np.array_equal(part.rank_in, first.rank_in) for part in parts[1:])


def fused(parts: Sequence[tuple[int, Factors | None]]) -> Factors:
    """One pair for several atoms of given widths that lie side by side on the out axis; None: the atom has no adapter.
    Nothing that is fused has DoRA."""
    present = [part for _, part in parts if part is not None]
    if len(parts) == len(present) == 1:
        return present[0]
    first, shared = present[0], shares_a(present)
    rank = first.rank if shared else sum(part.rank for part in present)
    out_rank = np.zeros((sum(width for width, _ in parts), rank), np.float32)
    row, column = 0, 0
    for width, part in parts:
        if part is not None:
            block = out_rank[row : row + width, column : column + part.rank]
            block[...] = part.widened(part.rank, first.scaling).out_rank
            column += 0 if shared else part.rank
        row += width
    rank_in = first.rank_in if shared else np.concatenate([part.rank_in for part in present])
    return Factors(rank_in, out_rank, first.scaling)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model. `low_rank` and `whole` give, by atom, its factors and (for a module that was
    trained whole) its numbers as [out, in]; each is read when it is called for."""

    config: AdapterConfig
    name: str
    low_rank: Mapping[str, Callable[[], Factors]]
    whole: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)

    def factors(self, atom: str) -> Factors | None:
        """The adapter of an atom; None if it has none. Raises CheckpointError if a number of it is not finite."""
        read = self.low_rank.get(atom)
        if read is None:
            return None
        found = read()
        for array in (found.rank_in, found.out_rank, found.magnitude):
            if array is not None and not np.isfinite(array).all():
                raise CheckpointError(f"{self.name}: the adapter of '{atom}' holds NaN or infinite numbers.")
        return found

    def applied(self, atom: str, weight: np.ndarray) -> np.ndarray:
        """The atom (float32 [out, in]) as the adapted model has it; the array itself where nothing changes."""
        if atom in self.whole:
            whole = np.asarray(self.whole[atom](), np.float32)
            if not np.isfinite(whole).all():
                raise CheckpointError(f"{self.name}: '{atom}' holds NaN or infinite numbers.")
            return whole
        factors = self.factors(atom)
        return weight if factors is None else factors.applied(weight)

    def touches(self, atom: str) -> bool:
        """Whether the adapter changes the atom."""
        return atom in self.low_rank or atom in self.whole

    def in_memory(self, table: Table) -> Iterator[tuple[str, np.ndarray]]:
        """The adapter's parameters under the names of the model in memory (`table`), one after another."""
        rank, scaling = self.config.rank, self.config.scaling
        for target in self.config.targets:
            tensor = table.tensors[weight_of(target)]
            experts = tensor.shape[0] if EXPERTS.fullmatch(target) else 1
            atoms = [(table.atoms[atom].shape[0], self.factors(atom)) for atom, _ in tensor.parts]
            size = len(atoms) // experts
            pairs = [fused(atoms[size * e : size * (e + 1)]).widened(rank, scaling) for e in range(experts)]
            arrays = {"lora_A": [p.rank_in.T for p in pairs], "lora_B": [p.out_rank.T for p in pairs]}
            if pairs[0].magnitude is not None:
                arrays["magnitude"] = [pairs[0].magnitude]
            for name, per_expert in arrays.items():
                array = np.stack(per_expert) if EXPERTS.fullmatch(target) else np.ascontiguousarray(per_expert[0])
                yield f"{slot(target)}.{name}", array


def memory_adapter(
    config: AdapterConfig, arrays: Mapping[str, np.ndarray], table: Table, *, name: str = "the model's adapter"
) -> Adapter:
    """The adapter of a model in memory (`table`); `arrays` holds its parameters and the whole modules by name and may
    fetch each when it is asked for."""

    def factors(target: str, atom: str) -> Factors:
        path, place = slot(target), table.places[atom]
        a_array, b_array = arrays[f"{path}.lora_A"], arrays[f"{path}.lora_B"]
        magnitude = arrays[f"{path}.magnitude"] if config.dora else None
        if EXPERTS.fullmatch(target):
            a_array = a_array[int(atom.rsplit(".", 3)[1])]
        out_rank = place.view(b_array).reshape(table.atoms[atom].shape[0], -1)
        return Factors(a_array.T, out_rank, config.scaling, magnitude)

    low_rank = {
        atom: (lambda target=target, atom=atom: factors(target, atom))
        for target in config.targets
        for atom, _ in table.tensors[weight_of(target)].parts
    }
    whole = {
        atom: (lambda tensor=tensor, view=view, atom=atom: view(arrays[tensor]).reshape(table.atoms[atom].shape))
        for module in config.modules_to_save
        for tensor in table.tensors
        if tensor.startswith(module + ".")
        for atom, view in table.tensors[tensor].parts
    }
    return Adapter(config, name, low_rank, whole)


def alpha_of(scaling: float, rank: int, *, rslora: bool) -> float:
    """The alpha by which an adapter of this rank has this scaling; a whole number where it is one."""
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
