"""Adapters merged into the weights of their base: another source of atoms, in fp32, rounded once by whoever writes it.

One adapter: W + scaling * B A (DoRA: with its lengths), modules trained whole in place of the base's. Several: W plus
their differences from W, weighted and combined. Methods are those of PEFT's `add_weighted_adapter`, but on the exact
differences of whole weights, as their papers state them, where PEFT combines A's with A's and B's with B's (whose
product is not the combination of the products):

    linear     sum of weight * difference
    ties       keep the `density` largest of each difference; per number elect the sign of the sum; average what agrees
               (weighted before, as PEFT does)                                                   arXiv 2306.01708
    dare       keep a random `density` of each difference, divided by it; then linear                arXiv 2311.03099
    dare_ties  the same; then elect and average as ties does

Knows no paddle and writes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erniekit.base.errors import CheckpointError, ConfigError, listed
from erniekit.checkpoint.adapter import Adapter
from erniekit.checkpoint.folder import Folder

METHODS = ("linear", "ties", "dare", "dare_ties")


@dataclass(frozen=True)
class Recipe:
    """How several adapters become one: a weight for each, and a method with its settings."""

    weights: tuple[float, ...] = (1.0,)
    method: str = "linear"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.method in METHODS, self.method
        if not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density:g} is not above 0 and at most 1.")

    def combined(self, differences: Sequence[np.ndarray], atom: str) -> np.ndarray:
        """One difference (fp32) of several; `atom` names what is drawn for it."""
        thinned = [self._thinned(array, f"{i} {atom}") for i, array in enumerate(differences)]
        weighted = [np.float32(weight) * array for weight, array in zip(self.weights, thinned, strict=True)]
        total = np.stack(weighted).sum(axis=0)
        if self.method in ("linear", "dare"):
            return total
        sign = np.sign(np.sum(thinned, axis=0))
        agree = [np.sign(array) == sign for array in thinned]
        masked = [array * mask for array, mask in zip(weighted, agree, strict=True)]
        counts = np.maximum(np.sum(agree, axis=0, dtype=np.float32), np.float32(1))
        return np.asarray(np.sum(masked, axis=0, dtype=np.float32) / counts)

    def _thinned(self, array: np.ndarray, name: str) -> np.ndarray:
        if self.method == "linear" or self.density == 1:
            return array
        if self.method == "ties":
            count = int(self.density * array.size)
            order = np.argpartition(-np.abs(array).reshape(-1), max(count - 1, 0))[:count]
            kept = np.zeros(array.size, np.float32)
            kept[order] = array.reshape(-1)[order]
            return kept.reshape(array.shape)
        generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode())]))
        return np.where(generator.random(array.shape, np.float32) < self.density, array, 0) / np.float32(self.density)


class Merged:
    """The atoms of `base` with adapters in them; a Source (source.py)."""

    def __init__(self, base: Folder, adapters: Sequence[Adapter], recipe: Recipe | None = None) -> None:
        self.base, self.adapters, self.recipe = base, list(adapters), recipe or Recipe()
        assert len(self.recipe.weights) == len(self.adapters), "a weight for each adapter"
        _require_alike(self.adapters)

    def read(self, atom: str) -> np.ndarray:
        """The atom as the base's view shows it: the base's own numbers where no adapter is, else fp32."""
        seen = self.base.read(atom)
        adapters = self.adapters
        if not any(adapter.touches(atom) for adapter in adapters):
            return seen
        weight = seen.reshape(self.base.table.atoms[atom].shape).astype(np.float32)
        if self.recipe.weights == (1.0,) and self.recipe.method == "linear":
            return adapters[0].applied(atom, weight).reshape(seen.shape)
        differences = [adapter.applied(atom, weight) - weight for adapter in adapters]
        return (weight + self.recipe.combined(differences, atom)).reshape(seen.shape)

    def release(self, atom: str) -> None:
        """Let the base's pages go."""
        self.base.release(atom)


def _require_alike(adapters: Sequence[Adapter]) -> None:
    """Raise CheckpointError unless all adapters change the same modules."""
    first, *others = adapters
    problems = []
    for other in others:
        for mine, theirs, kind in (
            (first.config.targets, other.config.targets, "adapts"),
            (first.config.modules_to_save, other.config.modules_to_save, "holds the whole of"),
        ):
            for holder, lacking, names in (
                (first, other, set(mine) - set(theirs)), (other, first, set(theirs) - set(mine)),
            ):  # fmt: skip
                problems += [f"{holder.name} {kind} '{name}', and {lacking.name} does not." for name in sorted(names)]
    if problems:
        raise CheckpointError(
            ["Only adapters with the same targets are merged, or a weight would mean something else in each module:",
             *listed(problems, limit=6)]
        )  # fmt: skip
