"""Which evaluation was the best, and whether the run has waited long enough for a better one.

Its state is a few numbers in every checkpoint, so that a resumed run decides as one that was never cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erniekit.base.errors import ConfigError, did_you_mean
from erniekit.config.run import RunConfig


def _metric(asked: str | None, known: Sequence[str]) -> str:
    """The figure that `metric_for_best_model` names, with or without `eval_` before it."""
    for name in (asked or "eval_loss", f"eval_{asked}"):
        if name in known:
            return name
    raise ConfigError(
        f"metric_for_best_model: '{asked}' is no figure of the evaluation.{did_you_mean(asked or '', known)} "
        f"Known: {', '.join(known)}."
    )


@dataclass
class BestModel:
    """Judges evaluations. `step` and `value` are those of the best so far, `waited` counts the ones since then that
    were no better by `threshold`."""

    metric: str = "eval_loss"
    greater: bool = False
    keep: bool = False  # whether the best model is saved, and the run ends with it
    patience: int = 0  # 0: never stop early
    threshold: float = 0.0
    step: int = 0
    value: float | None = None
    waited: int = 0

    @classmethod
    def of(cls, cfg: RunConfig, *, figures: Sequence[str], measured: bool) -> BestModel:
        """As the run sets it; `figures` are the names of what an evaluation finds, if there is anything to be measured.

        Raises ConfigError for a figure that will not be measured.
        """
        watch = cfg.watch
        metric, greater = _metric(watch.metric_for_best_model, figures), watch.greater_is_better
        if not measured and (watch.load_best_model_at_end or watch.early_stopping_patience):
            raise ConfigError(
                "load_best_model_at_end and early_stopping_patience need evaluations, and there is nothing to evaluate "
                "on: set eval_dataset_path."
            )
        return cls(
            metric, "accuracy" in metric if greater is None else greater, watch.load_best_model_at_end,
            watch.early_stopping_patience, watch.early_stopping_threshold,
        )  # fmt: skip

    def judge(self, step: int, figures: Mapping[str, float]) -> bool:
        """Take in an evaluation; returns whether it is the best so far."""
        value = figures[self.metric]
        gain = math.inf if self.value is None else (value - self.value) * (1 if self.greater else -1)
        better = math.isfinite(value) and gain > 0
        self.waited = 0 if better and gain > self.threshold else self.waited + 1
        if better:
            self.step, self.value = step, value
        return better

    @property
    def waited_enough(self) -> bool:
        """Whether the run should end."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"metric": self.metric, "step": self.step, "value": self.value, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what was judged by another figure is forgotten."""
        if state.get("metric") == self.metric:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
