"""Parallel equals single: the same training once in this process and once on the ranks of a layout, number by number.

A `Case` is a model folder, the keys of a run and the rows of some steps. `single` trains it in this process; `parallel`
trains it on forked ranks, each with its rows and its part of the model, and puts the parts together again: what several
ranks hold must be the same on all of them. `assert_same` compares losses, every gradient of every step by parameter
name, and the weights after the last step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.config.align import REFERENCE_FREE
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.config.run import RunConfig
from erniekit.data.batch import Batch, Row, make_batch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import (
    adapter_of,
    architecture,
    assemble_model,
    assemble_optimizer,
    loss_weights,
    router_upkeep,
)
from erniekit.training.objective import LanguageModelObjective
from erniekit.training.optimizer import Optimizer
from erniekit.training.preference import preference_objective
from erniekit.training.reference import base_log_probs
from erniekit.training.step import Objective, Totals
from tests.parallel.ranks import run_ranks

LOSS, GRADIENT, WEIGHT = 1e-6, 1e-5, 1e-5  # how far apart parallel and single may be
COPIES = 1e-6  # and what several ranks hold
_ADAPTER = re.compile(r"(?P<module>.*?)(?P<slot>\.adapter|_adapter)\.(?P<factor>lora_A|lora_B|magnitude)")

Step = Sequence[Sequence[Row]]  # micro-batches of rows, those of all data ranks together
Numbers = dict[str, np.ndarray]  # by parameter name


@dataclass(frozen=True)
class Case:
    """What is trained. `keys` are those of a run file; every micro-batch has as many rows for each data rank."""

    folder: Path
    steps: Sequence[Step]
    keys: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 0.1

    @cached_property
    def cfg(self) -> RunConfig:
        """The run, in fp32."""
        return load_config({"compute_type": "fp32", **self.keys})

    @cached_property
    def weights(self) -> Folder:
        """The folder, opened."""
        return Folder.open(self.folder)

    @cached_property
    def arch(self) -> ErnieConfig:
        """What is built."""
        return architecture(self.weights, self.cfg)

    def model(self, mesh: Mesh) -> ErnieForCausalLM:
        """The model that a rank trains."""
        adapter = adapter_of(self.weights, self.arch, self.cfg)
        return assemble_model(self.weights, self.arch, self.cfg, mesh=mesh, adapter=adapter)

    def objective(self, mesh: Mesh) -> Objective:
        """What the stage minimises."""
        weights, stage = loss_weights(self.arch, self.cfg, mesh=mesh), self.cfg.model.stage
        if stage in ("PT", "SFT"):
            return LanguageModelObjective(weights)
        reference = None if self.cfg.align.loss_type in REFERENCE_FREE else base_log_probs
        return preference_objective(stage, self.cfg.align, weights, reference=reference)


@dataclass
class Outcome:
    """What training gave: of one rank, its part of everything; of all, the whole."""

    losses: list[float] = field(default_factory=list)  # of every step
    norms: list[float] = field(default_factory=list)  # of the gradient, over all ranks
    gradients: list[Numbers] = field(default_factory=list)  # of every step
    weights: Numbers = field(default_factory=dict)  # after the last step


# ---------------------------------------------------------------------- training
def batches_of(step: Step, mesh: Mesh) -> list[Batch]:
    """The micro-batches of a rank: of each, its consecutive rows."""
    data = mesh.axis("data")
    assert all(len(rows) % data.size == 0 for rows in step)
    return [make_batch(rows[data.share(len(rows))], pad_id=0, max_seq_len=1024) for rows in step]


def summed_gradients(optimizer: Optimizer) -> Numbers:
    """The gradients of what this rank holds, added up over those who hold it; NaN where another rank updates."""
    found = {}
    for piece in optimizer.gradients():
        array = np.full(optimizer.parameters[piece.name].shape, np.nan, np.float32)
        array.reshape(-1)[piece.start : piece.stop] = piece.tensor.numpy().reshape(-1)
        found[piece.name] = array
    return found


@paddle.no_grad()
def descend(optimizer: Optimizer, *, rate: float) -> None:
    """A step of plain SGD, by the ranges that the optimizer updates."""
    sync = optimizer.sync
    for name in sync.names:
        weight, gradient = sync.weight(name), sync.gradient(name)
        if weight.size:
            weight.subtract_(rate * gradient)
    optimizer.clear()
    sync.gather_weights()


def train(mesh: Mesh, case: Case, prepare: Callable[[], None] = lambda: None) -> Outcome:
    """Train with plain SGD, and keep what `prepare` makes of this process out of the others."""
    prepare()
    model, objective = case.model(mesh), case.objective(mesh)
    model.train()
    upkeep, outcome = router_upkeep(model, case.cfg, mesh=mesh), Outcome()
    optimizer = assemble_optimizer(model, case.cfg, mesh=mesh)
    for step in case.steps:
        batches, loss = batches_of(step, mesh), 0.0
        totals = Totals.of(batches, row_length=1024).over(mesh.axis("data"))
        objective.begin(model, batches)
        for number, batch in enumerate(batches, start=1):
            made = objective(model, batch, totals)
            optimizer.expect(last=number == len(batches))
            made.total.backward()
            upkeep.count(made.routings, made.mask_M)
            loss += float(made.total)
        outcome.norms.append(optimizer.gradient_norm())
        gradients = summed_gradients(optimizer)
        descend(optimizer, rate=case.rate)
        upkeep.after_optimizer()
        outcome.losses.append(loss)
        outcome.gradients.append(gradients)
    with optimizer.whole_weights():
        outcome.weights = {name: p.numpy() for name, p in model.named_parameters()}
    return outcome


def single(case: Case) -> Outcome:
    """In this process alone."""
    return train(Mesh.single(), case)


def parallel(case: Case, layout: Layout, prepare: Callable[[], None] = lambda: None) -> Outcome:
    """On the ranks of `layout`, each of which calls `prepare` first."""
    parts: list[Outcome] = run_ranks(train, layout, case, prepare)
    held = [held_by(case, Cut.of(layout, rank)) for rank in range(layout.world)]
    losses = np.array([part.losses for part in parts]).reshape(layout.data, layout.tensor, -1)
    np.testing.assert_allclose(losses, np.broadcast_to(losses[:, :1], losses.shape), rtol=LOSS)
    assert all(part.norms == parts[0].norms for part in parts), [part.norms for part in parts]
    return Outcome(
        losses[:, 0].sum(0).tolist(), parts[0].norms,
        [joined([part.gradients[i] for part in parts], held) for i in range(len(case.steps))],
        joined([part.weights for part in parts], held),
    )


# ---------------------------------------------------------------------- parts and wholes
@dataclass(frozen=True)
class Held:
    """Which part of a parameter a rank holds: the shape of the whole, and indices for each of its dimensions."""

    shape: tuple[int, ...]
    indices: tuple[np.ndarray, ...]


def held_by(case: Case, cut: Cut) -> Callable[[str, np.ndarray], Held]:
    """Tells by a parameter's name and a rank's part of it which part that is."""
    head_bias = case.weights.has_head_bias
    whole, mine = (memory_table(case.arch, head_bias=head_bias, cut=each) for each in (Cut(), cut))

    def of_weight(name: str) -> Held:
        shape, local = whole.tensors[name].shape, np.empty(mine.tensors[name].shape, np.int64)
        numbers = np.arange(math.prod(shape)).reshape(shape)
        for atom, view in mine.tensors[name].parts:
            view(local)[...] = whole.places[atom].view(numbers)[mine.held.get(atom, ())]
        return Held(shape, tuple(np.unique(where) for where in np.unravel_index(local, shape)))

    def held(name: str, part: np.ndarray) -> Held:
        found = _ADAPTER.fullmatch(name)
        if not found:
            return of_weight(name)
        weight = of_weight(found["module"] + (".weight" if found["slot"] == ".adapter" else "_proj"))
        *experts, (num_in, ins), (num_out, outs) = zip(weight.shape, weight.indices, strict=True)
        rank_A, rank_B = part.shape[-1], part.shape[-2] if part.ndim > 1 else 0
        dims = {
            "lora_A": [*experts, (num_in, ins), (rank_A, np.arange(rank_A))],
            "lora_B": [*experts, (rank_B, np.arange(rank_B)), (num_out, outs)],
            "magnitude": [(num_out, outs)],
        }[found["factor"]]
        return Held(tuple(size for size, _ in dims), tuple(indices for _, indices in dims))

    return held


def joined(parts: Sequence[Numbers], held: Sequence[Callable[[str, np.ndarray], Held]]) -> Numbers:
    """The whole of every parameter. Raises AssertionError where a number is held by nobody, or differs among those who
    hold it."""
    found = {}
    for name in parts[0]:
        array: np.ndarray | None = None
        for rank, part in enumerate(parts):
            place = held[rank](name, part[name])
            assert part[name].shape == tuple(map(len, place.indices)), f"{name} of rank {rank}: {part[name].shape}"
            array = np.full(place.shape, np.nan, np.float32) if array is None else array
            here = np.ix_(*place.indices)
            mine = np.where(np.isnan(part[name]), array[here], part[name])  # NaN: what it does not update
            known = np.where(np.isnan(array[here]), mine, array[here])
            both = ~np.isnan(known)
            apart = furthest(mine[both], known[both])
            assert apart <= COPIES, f"{name}: rank {rank} has other numbers than ranks before it"
            array[here] = mine
        assert array is not None and not np.isnan(array).any(), f"{name}: a part of it is held by nobody, or is NaN"
        found[name] = array
    return found


# ---------------------------------------------------------------------- comparing
def furthest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, by the largest number that is expected."""
    most = np.abs(expected).max(initial=0.0)
    difference = np.abs(found - expected).max(initial=0.0)
    return float(difference / most) if most else float(difference)


def distances(found: Outcome, expected: Outcome) -> dict[str, float]:
    """How far apart everything is, in units of what is allowed, the worst first."""
    far = {}
    for step, (mine, its) in enumerate(zip(found.losses, expected.losses, strict=True), start=1):
        far[f"loss of step {step}"] = abs(mine - its) / abs(its) / LOSS
    for step, (mine, its) in enumerate(zip(found.norms, expected.norms, strict=True), start=1):
        far[f"gradient norm of step {step}"] = abs(mine - its) / abs(its) / GRADIENT
    for step, (mine, its) in enumerate(zip(found.gradients, expected.gradients, strict=True), start=1):
        assert mine.keys() == its.keys(), f"gradients of step {step}: {sorted(mine.keys() ^ its.keys())}"
        far |= {f"gradient of step {step}, {name}": furthest(mine[name], its[name]) / GRADIENT for name in its}
    assert found.weights.keys() == expected.weights.keys()
    its = expected.weights
    far |= {f"weights, {name}": furthest(found.weights[name], its[name]) / WEIGHT for name in its}
    return dict(sorted(far.items(), key=lambda item: -item[1]))


def assert_parallel_equals_single(case: Case, layout: Layout) -> None:
    """Raise AssertionError with everything that differs."""
    far = distances(parallel(case, layout), single(case))
    wrong = [f"{what}: {times:.2g} times as far as allowed" for what, times in far.items() if not times <= 1]
    assert not wrong, f"{layout}:\n" + "\n".join(wrong)
