"""One optimizer step: micro-batches, accumulation, clipping, update.

The objective returns, for each micro-batch, a loss that is already divided by the step's GLOBAL totals, so that the sum
over micro-batches and data ranks is the loss of the whole batch however it was cut. The same holds for every figure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import paddle

from erniekit.base.errors import TrainingStopped
from erniekit.data.batch import Batch, PreferenceBatch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.moe import Routing
from erniekit.parallel.collectives import Axis
from erniekit.parallel.mesh import Mesh
from erniekit.training.optimizer import Optimizer
from erniekit.training.router import RouterUpkeep

IGNORED = -100


@dataclass(frozen=True)
class Totals:
    """Counts over the whole global batch of a step."""

    trained: int  # positions with a label
    positions: int  # rows * max_seq_len
    micro_batches: int  # those of all data ranks: each gives its share to what is a mean over them
    tokens: int  # positions that are not padding
    pairs: int = 0  # samples of a preference batch: pairs, or answers that are judged by themselves

    @classmethod
    def of(cls, batches: Sequence[Batch], *, row_length: int) -> Totals:
        """Count a step's micro-batches."""
        return cls(
            trained=sum(int(np.count_nonzero(b.labels != IGNORED)) for b in batches),
            positions=sum(b.labels.shape[0] for b in batches) * row_length,
            micro_batches=len(batches),
            tokens=sum(int(np.count_nonzero(b.segment_ids)) for b in batches),
            pairs=sum(len(b.samples) for b in batches if isinstance(b, PreferenceBatch)),
        )

    def over(self, data: Axis) -> Totals:
        """The counts of all ranks of the data axis together."""
        if data.size == 1:
            return self
        return Totals(*data.all_reduce(paddle.to_tensor(astuple(self), "int64")).tolist())


class Losses(NamedTuple):
    """What an objective makes of one micro-batch."""

    total: paddle.Tensor  # to differentiate; its value is the micro-batch's share of the reported loss
    parts: dict[str, paddle.Tensor]  # further figures, summed over micro-batches for the log
    routings: list[Routing]
    mask_M: paddle.Tensor  # which tokens are not padding


class Objective(Protocol):
    """What is minimised. Batches are of the kind that the stage's data is made of."""

    def begin(self, model: ErnieForCausalLM, batches: Sequence[Any]) -> None:
        """Look at all micro-batches of a step before the first of them, for what is a figure of the whole step."""

    def __call__(self, model: ErnieForCausalLM, batch: Any, totals: Totals) -> Losses:
        """The share of one micro-batch, divided by the step's global totals."""


@dataclass
class StepResult:
    """The figures of one step, as they go to train_log.jsonl."""

    loss: float
    grad_norm: float
    tokens: int
    trained: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


def train_step(
    model: ErnieForCausalLM, optimizer: Optimizer, *,
    batches: Sequence[Batch], objective: Objective, upkeep: RouterUpkeep, learning_rate: float, row_length: int,
    before_update: Callable[[float], None] | None = None, mesh: Mesh = Mesh.single(),
) -> StepResult:  # fmt: skip
    """Accumulate the gradients of all micro-batches, update the model once; `before_update` sees the loss before.

    `batches` are this rank's; the figures are those of the whole step, the same numbers on all ranks. Raises
    TrainingStopped, on all ranks, before anything is changed if the loss or the gradient norm is not finite.
    """
    started = time.perf_counter()
    totals = Totals.of(batches, row_length=row_length).over(mesh.axis("data"))
    loss, parts = 0.0, dict[str, float]()
    objective.begin(model, batches)
    for number, batch in enumerate(batches, start=1):
        made = objective(model, batch, totals)
        optimizer.expect(last=number == len(batches))
        made.total.backward()
        upkeep.count(made.routings, made.mask_M)
        loss += float(made.total)
        for name, value in made.parts.items():
            parts[name] = parts.get(name, 0.0) + float(value)
    grad_norm = optimizer.gradient_norm()
    loss, parts, grad_norm = _together(mesh, loss=loss, parts=parts, grad_norm=grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.clear()
        raise TrainingStopped(f"the loss is {loss} and the gradient norm {grad_norm}")
    if before_update is not None:
        before_update(loss)
    optimizer.step(learning_rate, gradient_norm=grad_norm)
    parts |= upkeep.after_optimizer()
    return StepResult(loss, grad_norm, totals.tokens, totals.trained, time.perf_counter() - started, parts)


def _together(
    mesh: Mesh, *, loss: float, parts: dict[str, float], grad_norm: float
) -> tuple[float, dict[str, float], float]:
    """The figures of all data ranks added up, and one gradient norm for all: ranks decide by equal numbers."""
    world = mesh.axis("world")
    if world.size == 1:
        return loss, parts, grad_norm
    counts = mesh.coordinates.tensor == 0  # tensor ranks work on the same rows
    own = [loss, *parts.values()] if counts else [0.0] * (1 + len(parts))
    norm = grad_norm if mesh.first or not math.isfinite(grad_norm) else 0.0
    loss, grad_norm, *values = world.all_reduce(paddle.to_tensor([own[0], norm, *own[1:]], "float64")).tolist()
    return loss, dict(zip(parts, values, strict=True)), grad_norm
