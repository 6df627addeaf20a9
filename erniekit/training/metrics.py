"""What a run says: train_log.jsonl, TensorBoard, and a progress bar (or one line a step where there is no terminal)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

LOG_NAME = "train_log.jsonl"


def _kept_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Rows of an earlier part of the run up to `last_step`; a half-written last line is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= last_step:
            rows.append(row)
    return rows


class Reporter:
    """Collects the rows of a run (`history`) and shows each as it comes.

    Rows of an earlier part of the run up to `start_step` are kept; later ones belong to steps that are taken again.
    """

    def __init__(
        self, output_dir: Path, *, total_steps: int, start_step: int, logging_steps: int = 1,
        logging_dir: str | None = None, show_bar: bool | None = None,
    ) -> None:  # fmt: skip
        """`show_bar` None means: if stderr is a terminal."""
        path = output_dir / LOG_NAME
        self.history = _kept_rows(path, start_step)
        self._log: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        for row in self.history:
            self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._total, self._every = total_steps, max(logging_steps, 1)
        self._board = _event_writer(Path(logging_dir) if logging_dir else output_dir / "runs", start_step)
        bar = sys.stderr.isatty() if show_bar is None else show_bar
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, desc="train") if bar else None
        )

    def step(self, row: dict[str, Any]) -> None:
        """A training step was taken."""
        self._record(row)
        if row["step"] % self._every == 0 or row["step"] == self._total:
            self._plot("train", row)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tok/s", refresh=False)
            self._bar.update(1)
            return
        self._say(
            f"step {row['step']}/{self._total} loss {row['loss']:.6f} lr {row['lr']:.3e} "
            f"grad_norm {row['grad_norm']:.4f} tok/s {row['tokens_per_s']:.0f}"
        )

    def evaluation(self, row: dict[str, Any]) -> None:
        """The eval set was measured."""
        self._record(row)
        self._plot("eval", row)
        self._say(
            f"eval at step {row['step']}: loss {row['eval_loss']:.6f} perplexity {row['eval_perplexity']:.3f} "
            f"accuracy {row['eval_accuracy']:.4f}"
        )

    def saved(self, folder: Path) -> None:
        """A checkpoint stands."""
        self._say(f"saved {folder}")

    def close(self) -> None:
        """End the bar and the files."""
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._log.close()

    def _record(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()

    def _plot(self, group: str, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(f"{group}/{name}", value, row["step"])

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def _event_writer(folder: Path, start_step: int) -> Any:
    from tensorboardX import SummaryWriter  # half a second of imports that only a training run pays

    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
