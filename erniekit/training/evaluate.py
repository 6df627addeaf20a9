"""Loss, perplexity and token accuracy over an eval set, and over each of its sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from erniekit.base.errors import DataError
from erniekit.data.batch import Batch
from erniekit.data.build import EvalData
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.attention import end_rows_from_segments
from erniekit.parallel.mesh import Mesh


@dataclass(frozen=True)
class Score:
    """Sums over trained tokens, which add up over sources."""

    loss: float = 0.0
    correct: int = 0
    trained: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss + other.loss, self.correct + other.correct, self.trained + other.trained)

    def over(self, mesh: Mesh) -> Score:
        """What all data ranks have measured together."""
        data = mesh.axis("data")
        if data.size == 1:
            return self
        mesh.meet("measured")  # some may have had more to do
        sums = paddle.to_tensor([self.loss, self.correct, self.trained], "float64")
        loss, correct, trained = data.all_reduce(sums).tolist()
        return Score(loss, int(correct), int(trained))

    def figures(self) -> dict[str, float]:
        """eval_loss (mean over trained tokens), eval_perplexity, eval_accuracy, eval_tokens.

        Raises DataError if no position has a label.
        """
        if not self.trained:
            raise DataError("the eval set has no token to predict: every label is masked or it is empty.")
        mean = self.loss / self.trained
        return {
            "eval_loss": mean,
            "eval_perplexity": math.exp(min(mean, 700.0)),
            "eval_accuracy": self.correct / self.trained,
            "eval_tokens": self.trained,
        }


def short_names(sources: Sequence[str]) -> list[str]:
    """What sources are called in figures: the file's name, or the whole path where two files share one."""
    names = [Path(source).stem for source in sources]
    return [short if names.count(short) == 1 else source for short, source in zip(names, sources, strict=True)]


def figure_names(sources: Sequence[str]) -> list[str]:
    """The figures that an evaluation of these sources gives."""
    own = [f"eval_loss/{name}" for name in short_names(sources)] if len(sources) > 1 else []
    return [*Score(trained=1).figures(), *own]


def measure(
    model: ErnieForCausalLM, data: EvalData, *, batch_size: int, max_batches: int = -1, mesh: Mesh = Mesh.single()
) -> dict[str, float]:
    """The figures over all of `data`; with several sources, `eval_loss/NAME` of each as well. A positive `max_batches`
    stops early, in each source. Data ranks share the rows, `batch_size` each at a time."""
    names, at = short_names(data.source_names), mesh.axis("data")
    picked = enumerate(names) if len(names) > 1 else [(None, "")]
    scores = {
        name: score(
            model, data.batches(batch_size, source=source, index=at.index, parts=at.size), max_batches=max_batches
        ).over(mesh)
        for source, name in picked
    }
    if len(names) < 2:
        return scores[""].figures()
    own = {f"eval_loss/{name}": part.loss / part.trained for name, part in scores.items() if part.trained}
    return sum(scores.values(), Score()).figures() | own


@paddle.no_grad()
def score(model: ErnieForCausalLM, batches: Iterable[Batch], *, max_batches: int = -1) -> Score:
    """Measure in evaluation mode, and leave the model in the mode that it was in."""
    was_training = model.training
    model.eval()
    loss, correct, trained = 0.0, 0, 0
    for count, batch in enumerate(batches):
        if 0 < max_batches <= count:
            break
        segments = paddle.to_tensor(batch.segment_ids)
        trunk = model.trunk(
            paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.position_ids), end_rows_from_segments(segments)
        )
        hidden_MD = trunk.hidden_BSD.reshape([-1, trunk.hidden_BSD.shape[-1]])
        losses, corrects = model.lm_head.token_scores(hidden_MD, paddle.to_tensor(batch.labels).reshape([-1]))
        if not batch.counts:
            continue
        loss += float(losses.astype("float64").sum())
        correct += int(corrects.astype("int64").sum())
        trained += int(np.count_nonzero(batch.labels != -100))
    if was_training:
        model.train()
    return Score(loss, correct, trained)
