"""Where atoms come from, and the one loop that loading, saving and converting share: fill a tensor from its atoms."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from erniekit.checkpoint.ernie45 import Table, Tensor
from erniekit.checkpoint.keys import assign, whole


class Source(Protocol):
    """Anything that holds atoms: an opened folder, a model in memory, a generator of random weights."""

    def read(self, atom: str) -> np.ndarray:
        """The atom as its view shows it; often a view of a file or a parameter, never to be written to."""

    def release(self, atom: str) -> None:
        """The atom will not be read again soon."""


class Held:
    """The parts of atoms that one rank holds, out of a source of whole ones (`Table.held`): of a file, only the pages
    of the part are touched."""

    def __init__(self, source: Source, held: Mapping[str, tuple[slice, ...]]) -> None:
        self._source, self._held = source, held

    def read(self, atom: str) -> np.ndarray:
        """The part, as the atom's view shows it."""
        return self._source.read(atom)[self._held.get(atom, ())]

    def release(self, atom: str) -> None:
        """See Source."""
        self._source.release(atom)


def fill(target: np.ndarray, tensor: Tensor, source: Source) -> None:
    """Write every atom of `tensor` into `target`, converting formats."""
    for atom, view in tensor.parts:
        seen = view(target)
        assert np.may_share_memory(seen, target), atom
        assign(seen, source.read(atom))
        source.release(atom)


def made(tensor: Tensor, dtype: np.dtype, source: Source) -> np.ndarray:
    """The array of `tensor` in format `dtype`; the source's own array where nothing has to be changed."""
    (atom, view), *others = tensor.parts
    if view is whole and not others:
        array = source.read(atom)
        if array.dtype == dtype and array.flags.c_contiguous and array.shape == tensor.shape:
            return array
    array = np.empty(tensor.shape, dtype)
    fill(array, tensor, source)
    return array


class Memory:
    """The atoms of a model in memory: parameters under their own names; the mapping may fetch them one at a time."""

    def __init__(self, table: Table, parameters: Mapping[str, np.ndarray]) -> None:
        self.table = table
        # A stacked tensor is asked for once per expert, its two kinds in turn: keep the last few that were fetched.
        self._fetch = functools.lru_cache(maxsize=4)(parameters.__getitem__)

    def read(self, atom: str) -> np.ndarray:
        """A view of the parameter that holds the atom."""
        place = self.table.places[atom]
        return place.view(self._fetch(place.tensor))

    def release(self, atom: str) -> None:
        """Nothing to do: the model keeps its parameters."""
