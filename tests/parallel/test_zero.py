"""Every sharding stage against one process: loss, every gradient, weights after steps of SGD and of AdamW."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import paddle
import pytest

from erniekit.config.layout import Layout
from erniekit.data.batch import Batch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.layered import LayerShards
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.recompute import apply_recompute
from erniekit.parallel.zero import GradientSync
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.optimizer import AdamWSettings, Optimizer
from erniekit.training.step import Totals
from tests.parallel.ranks import run_ranks
from tests.unit.training.micro import make_model

ROWS, LENGTH, MICRO = 4, 16, 2  # rows of a global micro-batch, micro-batches of a step
FLAT_BYTES = 4 * 900  # several flats; the embedding (1024 numbers) is larger than one


def batch(seed: int, rows: slice) -> Batch:
    """Rows of a global micro-batch, with packed documents and another amount of padding in every row."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 64, (ROWS, LENGTH))
    segments = np.repeat(np.array([[1] * 6 + [2] * 10]), ROWS, axis=0)
    for row in range(ROWS):
        segments[row, LENGTH - row :] = 0
    positions = np.broadcast_to(np.array([*range(6), *range(10)]), ids.shape)
    labels = np.where(segments > 0, ids, -100)
    return Batch(*(np.ascontiguousarray(x[rows]) for x in (ids, labels, positions, segments)))


@dataclass(frozen=True)
class Case:
    """How a run is made."""

    adam: bool = True
    steps: int = 3
    clip: float = 0.5
    told: bool = True  # whether backward passes are announced
    recompute: bool = False
    moments: str = "float32"
    ema: float | None = None
    adaptive: bool = False
    frozen: str = ""  # parameters in whose names this is found


@dataclass
class Found:
    """What a rank has seen."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, list[tuple[int, int, np.ndarray]]] = field(default_factory=dict)
    state: list[tuple[str, int, int, bool, np.ndarray]] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    averages: dict[str, np.ndarray] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)


def make(mesh: Mesh, case: Case) -> tuple[ErnieForCausalLM, Optimizer]:
    model = make_model()
    for name, p in model.named_parameters():
        p.stop_gradient = p.stop_gradient or bool(case.frozen and case.frozen in name)
    if case.recompute:
        apply_recompute(model, "full")
    model.train()
    layers = LayerShards(model, mesh) if mesh.layout.stage == 3 else None
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    optimizer = Optimizer(
        model.named_parameters(), AdamWSettings(max_grad_norm=case.clip, weight_decay=0.1, epsilon=1e-5),
        rates={name: 0.5 for name in trained if "gate" in name}, moments=case.moments, ema_decay=case.ema,
        adaptive_clip=case.adaptive, sync=GradientSync(trained, mesh, flat_bytes=FLAT_BYTES, layers=layers),
    )  # fmt: skip
    return model, optimizer


def train(mesh: Mesh, case: Case) -> Found:
    model, optimizer = make(mesh, case)
    found, objective = Found(), LanguageModelObjective(LossWeights())
    here = mesh.axis("data").share(ROWS)
    for step in range(case.steps):
        whole = [batch(10 * step + micro, slice(None)) for micro in range(MICRO)]
        totals, loss = Totals.of(whole, row_length=LENGTH), paddle.zeros([])
        for micro in range(MICRO):
            if case.told:
                optimizer.expect(last=micro == MICRO - 1)
            made = objective(model, batch(10 * step + micro, here), totals)
            made.total.backward()
            loss = loss + made.total.detach()
        found.losses.append(float(mesh.axis("data").all_reduce(loss)))
        found.norms.append(optimizer.gradient_norm())
        for piece in optimizer.gradients():
            name = f"{step} {piece.name}"
            numbers = piece.tensor.numpy().reshape(-1)
            found.gradients.setdefault(name, []).append((piece.start, piece.stop, numbers.copy()))
        if case.adam:
            optimizer.step(0.01, gradient_norm=found.norms[-1])
        else:
            sgd(optimizer, found.norms[-1], clip=case.clip)
    found.traffic = dict(mesh.traffic.sent)
    for piece in optimizer.pieces():
        numbers = piece.tensor.astype("float32").numpy().reshape(-1)
        found.state.append((f"{piece.name}.{piece.part}", piece.start, piece.stop, piece.first, numbers.copy()))
    with optimizer.whole_weights():
        found.weights = {name: p.numpy().copy() for name, p in model.named_parameters()}
    if case.ema:
        with optimizer.averaged(), optimizer.whole_weights():
            found.averages = {name: p.numpy().copy() for name, p in model.named_parameters()}
        with optimizer.whole_weights():
            assert all(np.array_equal(found.weights[name], p.numpy()) for name, p in model.named_parameters())
    return found


@paddle.no_grad()
def sgd(optimizer: Optimizer, norm: float, *, clip: float) -> None:
    """weight -= rate * gradient, by the same ranges as AdamW."""
    sync = optimizer.sync
    for name in sync.names:
        weight, gradient = sync.weight(name), sync.gradient(name)
        if weight.size:
            weight.subtract_(gradient * (0.5 * min(1.0, clip / norm)))
    optimizer.clear()
    sync.gather_weights()


def joined(ranks: list[Found], name: str) -> np.ndarray:
    """A gradient from what the ranks have of it; where several have the same numbers, they agree."""
    pieces = [piece for found in ranks for piece in found.gradients[name]]
    whole = np.full(max(stop for _, stop, _ in pieces), np.nan, np.float32)
    for start, stop, numbers in pieces:
        seen = ~np.isnan(whole[start:stop])
        np.testing.assert_array_equal(whole[start:stop][seen], numbers[seen], err_msg=name)
        whole[start:stop] = numbers
    assert not np.isnan(whole).any(), name
    return whole


def compare(ranks: list[Found], single: Found, *, tolerance: float) -> None:
    for found in ranks:
        np.testing.assert_allclose(found.losses, single.losses, rtol=1e-6)
        np.testing.assert_allclose(found.norms, single.norms, rtol=1e-5)
        assert found.gradients.keys() <= single.gradients.keys()
        for name, value in single.weights.items():
            np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=tolerance, err_msg=name)
        for name, value in single.averages.items():
            np.testing.assert_allclose(found.averages[name], value, rtol=0, atol=tolerance, err_msg=name)
    for name, [(_, _, wanted)] in single.gradients.items():
        got = joined(ranks, name)
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


LAYOUTS = [
    Layout(2), Layout(4), Layout(2, sharding=2, stage=1), Layout(4, sharding=2, stage=1),
    Layout(2, sharding=2, stage=2), Layout(4, sharding=4, stage=2), Layout(4, sharding=2, stage=2),
    Layout(2, sharding=2, stage=3), Layout(4, sharding=4, stage=3), Layout(4, sharding=2, stage=3),
]  # fmt: skip


def label(layout: Layout) -> str:
    return f"{layout.world} ranks, stage{layout.stage} over {layout.sharding}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_steps_equal_those_of_one_process(layout: Layout) -> None:
    for case in (Case(adam=False), Case()):
        single = train(Mesh.single(), case)
        compare(run_ranks(train, layout, case), single, tolerance=2e-6)
