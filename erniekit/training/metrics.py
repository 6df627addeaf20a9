"""What a run says: train_log.jsonl, loggers, and a progress bar (or lines where there is no terminal)."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from erniekit.base.files import write_json, writing
from erniekit.config.run import RunConfig
from erniekit.data.build import TrainData
from erniekit.training.health import heat_map
from erniekit.training.loggers import Logger

LOG_NAME = "train_log.jsonl"
_GROUPS = ("moe", "fp8")  # of figures, apart from those of training


def read_log(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a log up to `last_step`; a half-written last line is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if last_step is None or row["step"] <= last_step:
            rows.append(row)
    return rows


def last_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last value of every figure, training and evaluation rows together."""
    figures: dict[str, float] = {}
    for row in rows:
        figures |= {name: value for name, value in row.items() if isinstance(value, (int, float))}
    return figures


def write_figures(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `folder`/metrics.json."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", last_figures(rows))


@dataclass(frozen=True)
class Display:
    """What of a run is shown. `every` steps go to console and loggers (0: none), and the first one if `first`; `bar`
    None means: if stderr is a terminal; `memory` adds the process's largest memory to the rows."""

    every: int = 1
    first: bool = False
    bar: bool | None = None
    memory: bool = False

    @classmethod
    def of(cls, cfg: RunConfig, data: TrainData) -> Display:
        """As the run sets it."""
        watch, strategy = cfg.watch, cfg.watch.logging_strategy
        every = cfg.train.logging_steps if strategy == "steps" else 0
        if strategy == "epoch":
            every = data.steps_per_epoch
        bar = False if cfg.train.disable_tqdm else None
        return cls(every, first=watch.logging_first_step, bar=bar, memory=not watch.skip_memory_metrics)


@dataclass(frozen=True)
class Volume:
    """What a run has worked through. Seconds are those of the steps, evaluation and saving apart."""

    steps: int
    tokens: int
    trained: int
    seconds: float

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Volume:
        """Add up the rows of a log."""
        steps = [row for row in rows if "tokens_per_s" in row]
        return cls(
            len(steps), sum(row["tokens"] for row in steps), sum(row.get("trained_tokens", 0) for row in steps),
            sum(row["tokens"] / row["tokens_per_s"] for row in steps if row["tokens_per_s"]),
        )  # fmt: skip

    @property
    def text(self) -> str:
        """A line for people."""
        rate = self.trained / self.seconds if self.seconds else 0.0
        return (
            f"{self.steps:,} steps, {self.trained:,} trained tokens of {self.tokens:,} in {clock(self.seconds)}: "
            f"{rate:,.0f} trained tokens/s"
        )


def clock(seconds: float) -> str:
    """A time for people."""
    return f"{seconds / 60:,.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _preferred(row: dict[str, Any]) -> str:
    """How well a step of preferences went."""
    margin = f" margin {row['margin']:+.4f}" if "margin" in row else ""
    return f" accuracy {row['accuracy']:.3f}{margin}" if "accuracy" in row else ""


class Reporter:
    """Collects the rows of a run (`history`) and shows each as it comes.

    Rows of an earlier part of the run up to `start_step` are kept; later ones belong to steps that are taken again. Of
    several ranks one has the folder: the others (`output_dir` None) know their own rows only, and write none.
    """

    def __init__(
        self, output_dir: Path | None, *, total_steps: int, start_step: int, loggers: Sequence[Logger] = (),
        display: Display = Display(),
    ) -> None:  # fmt: skip
        path = output_dir / LOG_NAME if output_dir else Path(os.devnull)
        self.history = read_log(path, last_step=start_step)
        self._log: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        for row in self.history:
            self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._total, self._display, self._loggers = total_steps, display, list(loggers)
        bar = sys.stderr.isatty() if display.bar is None else display.bar
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, desc="train") if bar else None
        )

    def step(self, row: dict[str, Any], modules: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """A training step was taken; `modules` are figures of FP8 modules, for the boards."""
        due = self.due(row["step"])
        if due and self._display.memory:
            row |= {"memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        self._record(row)
        if due:
            self._plot("train", row)
        if modules:
            values = {f"fp8_{name}/{module}": value for module, seen in modules.items() for name, value in seen.items()}
            self._each(lambda logger: logger.scalars(values, row["step"]))
        if "moe_tokens" in row:
            pixels = heat_map(row["moe_tokens"])
            self._each(lambda logger: logger.picture("moe/tokens_per_expert", pixels, row["step"]))
        if self._bar is not None:
            figures = f"loss {row['loss']:.4f}{_preferred(row)}, {row['tokens_per_s']:,.0f} tok/s"
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(1)
        elif due:
            self._say(
                f"step {row['step']}/{self._total} loss {row['loss']:.6f}{_preferred(row)} lr {row['lr']:.3e} "
                f"grad_norm {row['grad_norm']:.4f} tok/s {row['tokens_per_s']:.0f}"
            )
        if "moe_tokens" in row and self._display.every:
            self._say(
                f"experts at step {row['step']}: {row['moe_dead_experts']} unused, imbalance "
                f"{row['moe_imbalance']:.2f}, entropy {row['moe_entropy']:.3f}, "
                f"bias drift {row['moe_bias_drift']:.4f}, orthogonality {row['moe_orthogonality']:.4f}"
            )

    def evaluation(self, row: dict[str, Any]) -> None:
        """The eval set was measured."""
        self._record(row)
        self._plot("eval", row)
        perplexity = f" perplexity {row['eval_perplexity']:.3f}" if "eval_perplexity" in row else ""
        margin = f" margin {row['eval_margin']:+.4f}" if "eval_margin" in row else ""
        self._say(
            f"eval at step {row['step']}: loss {row['eval_loss']:.6f}{perplexity} accuracy {row['eval_accuracy']:.4f}"
            f"{margin}"
        )
        for name, value in row.items():
            if name.startswith("eval_loss/"):
                source = name.removeprefix("eval_loss/")
                right = row.get(f"eval_accuracy/{source}")
                self._say(f"  {source}: loss {value:.6f}{'' if right is None else f' accuracy {right:.4f}'}")

    def canary(self, row: dict[str, Any]) -> None:
        """What should not be forgotten was measured; a row that an earlier part of the run wrote is kept."""
        if not any("canary_loss" in earlier and earlier["step"] == row["step"] for earlier in self.history):
            self._record(row)
            self._plot("canary", row)
        self._say(f"canary at step {row['step']}: loss {row['canary_loss']:.6f}")

    def saved(self, folder: Path) -> None:
        """A checkpoint stands."""
        self._say(f"saved {folder}")

    def close(self) -> None:
        """End the bar and the files."""
        if self._bar is not None:
            self._bar.close()
        self._each(lambda logger: logger.close())
        self._log.close()

    def due(self, step: int) -> bool:
        """Whether the 1-based step is shown."""
        every = self._display.every
        return every > 0 and (step % every == 0 or step == self._total or (step == 1 and self._display.first))

    def _record(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()

    def _plot(self, group: str, row: dict[str, Any]) -> None:
        values = {
            f"{next((part for part in _GROUPS if name.startswith(f'{part}_')), group)}/{name}": value
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._each(lambda logger: logger.scalars(values, row["step"]))

    def _each(self, act: Callable[[Logger], None]) -> None:
        for logger in self._loggers:
            act(logger)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)
