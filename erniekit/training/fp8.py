"""FP8 in the loop: when guards look, when a step counts for scales, and when copies of weights are out of date.

How numbers are rounded is precision/'s business. Whatever changes weights outside the optimizer's step calls
`forget_weights`: a copy that is out of date would train on without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import paddle

from erniekit.base.console import warn
from erniekit.config.fp8 import Fp8
from erniekit.parallel.mesh import Mesh
from erniekit.precision.watch import FIGURES, Watch
from erniekit.training.state import Memory

_CLAMPED = 1e-3  # share of numbers beyond the format that is told of


class Held(Protocol):
    """What a recipe keeps beside the model."""

    def after_update(self) -> None:
        """The optimizer has moved the weights: a step is over."""

    def forget_weights(self) -> None:
        """The weights are others than before, without a step."""


class Fp8Training:
    """The FP8 side of a run; `memory` is what checkpoints keep of it."""

    def __init__(
        self, settings: Fp8, held: Held, watch: Watch, *, memory: Memory | None = None, mesh: Mesh = Mesh.single()
    ) -> None:  # fmt: skip
        self.settings, self.memory = settings, memory
        self._held, self._watch, self._axis, self._words = held, watch, mesh.axis("world"), mesh.words
        self._told: set[str] = set()

    def begin(self, step: int, *, logged: bool) -> None:
        """The 0-based step begins; `logged`: whether its figures will be shown."""
        every = self.settings.check_every
        self._watch.begin(looking=logged, comparing=bool(every) and (step + 1) % every == 0)

    def after_update(self) -> None:
        """The optimizer has moved the weights."""
        self._held.after_update()

    def forget_weights(self) -> None:
        """The weights were replaced."""
        self._held.forget_weights()

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Around a block before and after which the model has other weights than within."""
        self.forget_weights()
        try:
            yield
        finally:
            self.forget_weights()

    def scales(self) -> dict[str, np.ndarray]:
        """By which a step rounds its inputs, as far as steps before have found them."""
        return {name: tensor.numpy() for name, tensor in self.memory.state().items()} if self.memory else {}

    def astray(self) -> str:
        """What modules told of numbers that are not finite in this step, on every rank the first that did. All ranks
        call it, and all hear the same."""
        return "; ".join(dict.fromkeys(filter(None, self._words.collect("astray", self._watch.astray))))

    def report(self, step: int) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """What was seen in the 1-based `step`: the worst for the log, and the figures by module for the boards. All
        ranks call it; warns on each of what is wrong."""
        watch = self._watch
        if not (watch.looking or watch.comparing):
            return {}, {}
        figures, row = self._worst(watch.figures()), dict[str, Any]()
        modules = watch.told(figures, details=self.settings.details) if watch.looking else {}
        if modules:
            row |= {f"fp8_{name}": max(seen[name] for seen in modules.values()) for name in FIGURES}
            self._warn_of_clamped(step, modules)
        if watch.comparing:
            off = watch.warn_of(step, figures)
            row["fp8_off"] = max(off.values())
            for name, value in off.items():
                modules.setdefault(name, {})["off"] = value
        if self.settings.details:
            row["fp8"] = modules
        return row, modules

    def _worst(self, figures: np.ndarray) -> np.ndarray:
        """Of all ranks."""
        if self._axis.size == 1:
            return figures
        return self._axis.all_reduce(paddle.to_tensor(figures.astype("float32")), op="max").numpy()

    def _warn_of_clamped(self, step: int, modules: Mapping[str, Mapping[str, float]]) -> None:
        clamped = [name for name, seen in modules.items() if seen["overflow"] > _CLAMPED]
        new = [name for name in clamped if name not in self._told]
        self._told = set(clamped)
        if new:
            worst = max(new, key=lambda name: modules[name]["overflow"])
            more = f" (and {len(new) - 1} modules more)" if len(new) > 1 else ""
            warn(
                f"step {step}: {worst}{more}: {modules[worst]['overflow']:.2%} of the numbers are beyond what its "
                "scale covers, and are clamped. A larger actscale_moving_rate follows activations more closely."
            )


class Together:
    """Several memories as one; their names are distinct."""

    def __init__(self, parts: Sequence[Memory]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, *parts: Memory | None) -> Memory | None:
        """Those that there are; None if there is none."""
        there = [part for part in parts if part is not None]
        return cls(there) if len(there) > 1 else there[0] if there else None

    def state(self) -> dict[str, paddle.Tensor]:
        """See Memory."""
        return {name: tensor for part in self._parts for name, tensor in part.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """See Memory; every part takes what it knows."""
        for part in self._parts:
            part.load_state(state)
