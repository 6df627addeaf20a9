"""Parallel equals single: the same training once in this process and once on the ranks of a layout, number by number.

A `Case` is a model folder, the keys of a run and the rows of some steps. It goes through what a run goes through:
assemble_model, assemble_optimizer, train_step. Only the update is plain SGD unless AdamW is asked for: it shows a wrong
gradient as it is. Every rank gives what it holds; put together it is compared with one process: losses and all other
figures of every step, every gradient of every step by parameter name, and the weights after the last step. What several
ranks hold must be the same on all of them, to the last bit: else they would drift apart.

One fork of ranks trains any number of cases (`Runs`), and each of them also with one reduction left out (sabotage.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle

from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.config.run import RunConfig
from erniekit.data.batch import Batch, Row, make_batch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.adamw import Update
from erniekit.parallel.mesh import Mesh
from erniekit.training import optimizer as optimizers
from erniekit.training.assemble import (
    adapter_of,
    architecture,
    assemble_fp8,
    assemble_model,
    assemble_optimizer,
    loss_weights,
    router_upkeep,
    step_hooks,
)
from erniekit.training.objective import LanguageModelObjective
from erniekit.training.preference import Reference, preference_objective
from erniekit.training.reference import Follower, PolicyCopy, base_log_probs
from erniekit.training.step import Objective, train_step
from tests.parallel.ranks import run_ranks

LOSS, FIGURE, GRADIENT, WEIGHT = 1e-6, 1e-5, 1e-5, 1e-5  # how far apart parallel and single may be
_ADAPTER = re.compile(r"(?P<module>.*?)(?P<slot>\.adapter|_adapter)\.(?P<factor>(lora|initial)_[AB]|magnitude)")

Step = Sequence[Sequence[Row]]  # micro-batches of rows, those of all data ranks together
Numbers = dict[str, "Held"]  # by parameter name


@dataclass(frozen=True)
class Case:
    """What is trained. `keys` are those of a run file; every micro-batch has as many rows for each data rank."""

    folder: Path
    steps: Sequence[Step]
    keys: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 0.1
    adamw: bool = False

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

    @cached_property
    def alone(self) -> Whole:
        """What one process makes of it."""
        return together(self, Layout(), [train(Mesh.single(), self)])

    def model(self, mesh: Mesh) -> ErnieForCausalLM:
        """The model that a rank trains."""
        adapter = adapter_of(self.weights, self.arch, self.cfg)
        return assemble_model(self.weights, self.arch, self.cfg, mesh=mesh, adapter=adapter)

    def objective(self, mesh: Mesh, copy: PolicyCopy | None = None) -> Objective:
        """What the stage minimises; once there is something in `copy`, beside that."""
        weights, stage = loss_weights(self.arch, self.cfg, mesh=mesh), self.cfg.model.stage
        if stage in ("PT", "SFT"):
            return LanguageModelObjective(weights)
        start: Reference = Follower(base_log_probs, copy) if copy else base_log_probs
        reference = start if self.cfg.align.compares(stage) else None
        return preference_objective(stage, self.cfg.align, weights, reference=reference, mesh=mesh)


@dataclass
class Outcome:
    """What training gave. Of one rank, parameters and gradients are what it holds of them."""

    figures: list[dict[str, float]] = field(default_factory=list)  # of every step, the loss among them
    gradients: list[Numbers] = field(default_factory=list)  # of every step
    weights: Numbers = field(default_factory=dict)  # after the last step
    averages: Numbers = field(default_factory=dict)  # of the weights, if any are kept


@dataclass(frozen=True)
class Held:
    """A rank's numbers of a parameter: those from `start` on of the block that it has."""

    numbers: np.ndarray
    start: int = 0


# ---------------------------------------------------------------------- training
def batches_of(step: Step, mesh: Mesh) -> list[Batch]:
    """The micro-batches of a rank: of each, its consecutive rows."""
    data = mesh.axis("data")
    assert all(len(rows) % data.size == 0 for rows in step)
    return [make_batch(rows[data.share(len(rows))], pad_id=0, max_seq_len=1024) for rows in step]


def sgd(p: paddle.Tensor, gradient: paddle.Tensor, *, update: Update, **_others: Any) -> None:
    """In the place of AdamW."""
    paddle.assign(p.detach() - update.learning_rate * update.gradient_scale * gradient.astype(p.dtype), p)


def train(mesh: Mesh, case: Case) -> Outcome:
    """On this rank."""
    model = case.model(mesh)
    fp8 = assemble_fp8(model, case.cfg, mesh=mesh)
    copy = PolicyCopy(model, every=case.cfg.align.ref_model_update_steps)
    objective = case.objective(mesh, copy)
    model.train()
    optimizer, upkeep = assemble_optimizer(model, case.cfg, mesh=mesh), router_upkeep(model, case.cfg, mesh=mesh)
    outcome, hooks = Outcome(), step_hooks(model, case.cfg)

    def keep(_loss: float) -> None:
        pieces = {piece.name: Held(piece.tensor.numpy().ravel().copy(), piece.start) for piece in optimizer.gradients()}
        outcome.gradients.append(pieces)

    with nullcontext() if case.adamw else mock.patch.object(optimizers, "adamw", sgd):
        for number, step in enumerate(case.steps):
            copy.before_step(number)
            paddle.seed(number + 1000 * mesh.axis("data").index)
            for hook in hooks:
                hook(number)
            made = train_step(
                model, optimizer, batches=batches_of(step, mesh), objective=objective, upkeep=upkeep, mesh=mesh,
                learning_rate=case.rate, row_length=1024, before_update=keep,
            )  # fmt: skip
            if fp8:
                fp8.after_update()
            outcome.figures.append({"loss": made.loss, "gradient norm": made.grad_norm, **made.parts})
    with optimizer.whole_weights():
        outcome.weights = _held(model)
    if optimizer.averages():
        with optimizer.averaged(), optimizer.whole_weights():
            outcome.averages = _held(model)
    return outcome


def _held(model: ErnieForCausalLM) -> Numbers:
    return {name: Held(p.numpy().ravel().copy()) for name, p in model.named_parameters()}


def parallel(cases: Sequence[Case], layout: Layout) -> list[Whole]:
    """Each case on the ranks of `layout`."""
    parts = run_ranks(_train_all, layout, cases)
    return [together(case, layout, [of_rank[i] for of_rank in parts]) for i, case in enumerate(cases)]


def _train_all(mesh: Mesh, cases: Sequence[Case]) -> list[Outcome]:
    return [train(mesh, case) for case in cases]


# ---------------------------------------------------------------------- parts and wholes
@dataclass
class Whole:
    """What training gave, of all ranks together."""

    figures: list[dict[str, float]]
    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    averages: dict[str, np.ndarray]


def together(case: Case, layout: Layout, parts: Sequence[Outcome]) -> Whole:
    """Raises AssertionError where ranks that should have the same do not."""
    for rank, part in enumerate(parts):
        assert part.figures == parts[0].figures, f"rank {rank} tells {part.figures}, rank 0 {parts[0].figures}"
    places = [Places(case, Cut.of(layout, rank)) for rank in range(layout.world)]
    gradients = [joined([part.gradients[i] for part in parts], places) for i in range(len(case.steps))]
    weights = joined([part.weights for part in parts], places)
    return Whole(parts[0].figures, gradients, weights, joined([part.averages for part in parts], places))


class Places:
    """Which part of every parameter a rank has."""

    def __init__(self, case: Case, cut: Cut) -> None:
        head_bias = case.weights.has_head_bias
        self._whole, self._mine = (memory_table(case.arch, head_bias=head_bias, cut=each) for each in (WHOLE, cut))
        self._rank = case.cfg.lora.lora_rank

    def of(self, name: str) -> tuple[tuple[int, ...], tuple[np.ndarray, ...]]:
        """The shape of the whole parameter, and the indices of the part in each of its dimensions."""
        found = _ADAPTER.fullmatch(name)
        if not found:
            return self._of_weight(name)
        weight = found["module"] + (".weight" if found["slot"] == ".adapter" else "_proj")
        *experts, ins, outs = zip(*self._of_weight(weight), strict=True)
        ranks = self._rank, np.arange(self._rank)
        dims = {"A": [*experts, ins, ranks], "B": [*experts, ranks, outs], "magnitude": [outs]}
        shape, indices = zip(*dims[found["factor"].rpartition("_")[2]], strict=True)
        return shape, indices

    def _of_weight(self, name: str) -> tuple[tuple[int, ...], tuple[np.ndarray, ...]]:
        shape, local = self._whole.tensors[name].shape, np.empty(self._mine.tensors[name].shape, np.int64)
        numbers = np.arange(math.prod(shape)).reshape(shape)
        for atom, view in self._mine.tensors[name].parts:
            view(local)[...] = self._whole.places[atom].view(numbers)[self._mine.held.get(atom, ())]
        return shape, tuple(np.unique(where) for where in np.unravel_index(local, shape))


def joined(parts: Sequence[Numbers], places: Sequence[Places]) -> dict[str, np.ndarray]:
    """The whole of every parameter. Raises AssertionError where a number is held by nobody, is NaN, or differs among
    those who hold it."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        array: np.ndarray | None = None
        for rank, (part, place) in enumerate(zip(parts, places, strict=True)):
            shape, indices = place.of(name)
            array = np.full(shape, np.nan, np.float32) if array is None else array
            if name not in part:
                continue
            block, (numbers, start) = array[np.ix_(*indices)].ravel(), (part[name].numbers, part[name].start)
            assert start + len(numbers) <= block.size, f"{name} of rank {rank}: {len(numbers)} numbers from {start} on"
            mine = block[start : start + len(numbers)]
            known = np.where(np.isnan(mine), numbers, mine)
            assert np.array_equal(numbers, known), (
                f"{name}: rank {rank} has other numbers than ranks before it, {furthest(numbers, known):.2g} apart"
            )
            mine[...] = numbers
            array[np.ix_(*indices)] = block.reshape([len(index) for index in indices])
        assert array is not None and not np.isnan(array).any(), f"{name}: a part of it is held by nobody, or is NaN"
        found[name] = array
    return found


# ---------------------------------------------------------------------- comparing
def furthest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, by the largest number that is expected."""
    most = np.abs(expected).max(initial=0.0)
    difference = np.abs(found - expected).max(initial=0.0)
    return float(difference / most) if most else float(difference)


def distances(found: Whole, expected: Whole) -> dict[str, float]:
    """How far apart everything is, in units of what is allowed, the worst first."""
    far = {}
    for step, (mine, its) in enumerate(zip(found.figures, expected.figures, strict=True), start=1):
        assert mine.keys() == its.keys(), f"figures of step {step}: {sorted(mine.keys() ^ its.keys())}"
        for name, value in its.items():
            allowed = LOSS * abs(value) if name == "loss" else FIGURE * max(abs(value), 1.0)
            far[f"{name} of step {step}"] = abs(mine[name] - value) / allowed
    for step, (mine, its) in enumerate(zip(found.gradients, expected.gradients, strict=True), start=1):
        assert mine.keys() == its.keys(), f"gradients of step {step}: {sorted(mine.keys() ^ its.keys())}"
        far |= {f"gradient of step {step}, {name}": furthest(mine[name], its[name]) / GRADIENT for name in its}
    for what in ("weights", "averages"):
        mine, its = getattr(found, what), getattr(expected, what)
        assert mine.keys() == its.keys(), f"{what}: {sorted(mine.keys() ^ its.keys())}"
        far |= {f"{what}, {name}": furthest(mine[name], its[name]) / WEIGHT for name in its}
    return dict(sorted(far.items(), key=lambda item: -item[1]))


def assert_equal(case: Case, layout: Layout, found: Whole) -> None:
    """Raise AssertionError with everything in which it differs from one process."""
    wrong = [f"{what}: {times:.2g} times as far as allowed" for what, times in distances(found, case.alone).items()
             if not times <= 1]  # fmt: skip
    assert not wrong, f"{layout}, {case.keys}:\n" + "\n".join(wrong)


def assert_parallel_equals_single(cases: Case | Sequence[Case], layout: Layout) -> None:
    """Raise AssertionError with everything that differs in the first case that does."""
    cases = [cases] if isinstance(cases, Case) else cases
    for case, found in zip(cases, parallel(cases, layout), strict=True):
        assert_equal(case, layout, found)


class Runs:
    """Cases by name, judged one by one. Those that a layout is to train all train in one launch of ranks, when the
    first of them is asked for."""

    def __init__(self, cases: Mapping[str, Case]) -> None:
        self.cases = cases
        self._launched: dict[tuple[Layout, tuple[str, ...]], list[list[Outcome]] | AssertionError] = {}

    def assert_equal(self, name: str, layout: Layout, names: Sequence[str]) -> None:
        """Raise AssertionError with everything in which the case `name` on `layout`, which is to train `names`, differs
        from one process."""
        key = layout, tuple(names)
        if key not in self._launched:
            try:
                self._launched[key] = run_ranks(_train_all, layout, [self.cases[each] for each in names])
            except AssertionError as error:  # all cases have failed
                self._launched[key] = error
        if isinstance(launched := self._launched[key], AssertionError):
            raise launched
        case, parts = self.cases[name], [of_rank[names.index(name)] for of_rank in launched]
        assert_equal(case, layout, together(case, layout, parts))
