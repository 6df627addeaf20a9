"""What the guards of FP8 modules see: what casts did to numbers, and how far products are from unrounded ones.

Modules show what they cast only while the watch looks (at logging steps) and compare only while it compares: at other
steps nothing is measured. A pass that is taken again (recomputation, several micro-batches) shows the same or more: the
worst counts. Judges and warns; changes nothing, and knows no rank (training brings ranks together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import paddle

from erniekit.base.console import warn
from erniekit.ops.float8 import Float8, statistics
from erniekit.ops.grouped import grouped_linear

Role = Literal["x", "w", "g"]  # inputs, weights, gradients of outputs

ROLES: tuple[Role, ...] = ("x", "w", "g")
FIGURES = ("amax", "underflow", "overflow")
FAR = 0.15  # of an output's norm; rounding both operands to E4M3 makes about 0.04
_SHOWN = 3


class Watch:
    """The figures of a model's FP8 modules in a step."""

    def __init__(self, modules: Sequence[str]) -> None:
        """`modules` are all modules that will ever show anything, by name."""
        self.modules = tuple(modules)
        self.looking = self.comparing = False
        self.astray = ""  # what a module first told of numbers that are not finite, in this step
        self._places = {name: place for place, name in enumerate(self.modules)}
        self._seen_MRF = np.zeros([len(self.modules), len(ROLES), len(FIGURES)])
        self._off_M = np.zeros(len(self.modules))

    def begin(self, *, looking: bool, comparing: bool) -> None:
        """A step begins."""
        self.looking, self.comparing, self.astray = looking, comparing, ""
        self._seen_MRF[:], self._off_M[:] = 0.0, 0.0

    def lost(self, text: str) -> None:
        """A module met numbers that are not finite; all that follow will, too, so only the first is told of."""
        if not self.astray:
            self.astray = text
            warn(text)

    @paddle.no_grad()
    def saw(self, module: str, role: Role, *, given: paddle.Tensor, cast: Float8) -> None:
        """A module cast `given`; call it while `looking`."""
        seen = self._seen_MRF[self._places[module], ROLES.index(role)]
        np.maximum(seen, statistics(given, cast), out=seen)

    @paddle.no_grad()
    def compared(self, module: str, y: paddle.Tensor, *, exact: paddle.Tensor) -> None:
        """A module's output beside the product of the same operands, unrounded; call it while `comparing`."""
        exact = exact.astype("float32")
        norm = float(exact.norm()) if exact.size else 0.0
        if norm:
            place = self._places[module]
            self._off_M[place] = max(self._off_M[place], float((y.astype("float32") - exact).norm()) / norm)

    def figures(self) -> np.ndarray:
        """All that was seen in the step, 0 where nothing was: the worst of several ranks is their maximum."""
        return np.concatenate([self._seen_MRF.reshape([len(self.modules), -1]), self._off_M[:, None]], axis=1)

    def told(self, figures: np.ndarray, *, details: bool) -> dict[str, dict[str, float]]:
        """`figures` by module, for the log; with `details`, those of inputs, weights and gradients apart."""
        rows = {}
        for name, row in zip(self.modules, figures, strict=True):
            seen_RF = row[:-1].reshape([len(ROLES), len(FIGURES)])
            rows[name] = dict(zip(FIGURES, seen_RF.max(0).tolist(), strict=True))
            if details:
                rows[name] |= {
                    f"{figure}_{role}": float(value)
                    for role, values in zip(ROLES, seen_RF, strict=True)
                    for figure, value in zip(FIGURES, values, strict=True)
                }
        return rows

    def warn_of(self, step: int, figures: np.ndarray) -> Mapping[str, float]:
        """Warn of modules whose output is far from the unrounded one; returns how far all of them are."""
        off = dict(zip(self.modules, figures[:, -1].tolist(), strict=True))
        far = [name for name, value in off.items() if value > FAR]
        if far:
            worst = sorted(far, key=lambda name: -off[name])[:_SHOWN]
            more = f" (and {len(far) - _SHOWN} more)" if len(far) > _SHOWN else ""
            warn(
                f"step {step}: FP8 is far from unrounded products: "
                + ", ".join(f"{name} by {off[name]:.0%}" for name in worst)
                + f"{more}, where rounding makes about 4 %. If the loss suffers, leave them out with fp8_modules."
            )
        return off


@paddle.no_grad()
def unrounded(x_TD: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """The product that FP8's is compared with: rows sorted by expert, times the weight of each, or the only one."""
    weight_EDF = weight if weight.ndim == 3 else weight.unsqueeze(0)
    return grouped_linear(x_TD.detach(), weight_EDF.detach(), counts=counts)
