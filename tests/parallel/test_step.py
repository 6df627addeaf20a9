"""A step of several data ranks is the step of one process with the rows of all of them."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.base.errors import TrainingStopped
from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.zero import GradientSync
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.optimizer import AdamWSettings, Optimizer
from erniekit.training.router import RouterUpkeep
from erniekit.training.step import StepResult, train_step
from tests.parallel.ranks import run_ranks
from tests.unit.training.micro import make_batch, make_model, weights_of

WEIGHTS = LossWeights(multi_token=0.3)
LENGTH = 24


def batches_of(mesh: Mesh, *, num: int) -> list:
    """`num` micro-batches of four rows, with an uneven number of labels, of which a data rank takes its rows."""
    whole = make_batch(rows=4 * num, length=LENGTH)
    for row in range(4 * num):
        whole.labels[row, : row % 5] = -100
    data = mesh.axis("data")
    found = []
    for number in range(num):
        share = data.share(4)
        rows = slice(4 * number + share.start, 4 * number + share.stop)
        found.append(
            type(whole)(whole.input_ids[rows], whole.labels[rows], whole.position_ids[rows], whole.segment_ids[rows])
        )
    return found


def stepped(mesh: Mesh, num_steps: int, spoilt: int | None) -> tuple[list[StepResult], dict[str, np.ndarray], str]:
    """The results, the weights, and why the run was stopped; rank `spoilt` has a weight that is not finite."""
    model = make_model(sparse=False)
    if mesh.rank == spoilt:
        model.lm_head.weight.set_value(paddle.full_like(model.lm_head.weight, np.inf))
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    sync = GradientSync(trained, mesh)
    optimizer = Optimizer(model.named_parameters(), AdamWSettings(max_grad_norm=0.5), sync=sync)
    results = []
    try:
        for _ in range(num_steps):
            results.append(train_step(
                model, optimizer, batches=batches_of(mesh, num=2), objective=LanguageModelObjective(WEIGHTS),
                upkeep=RouterUpkeep(model, bias_coefficient=0.0, orthogonal_lambda=0.0), learning_rate=1e-2,
                row_length=LENGTH, mesh=mesh,
            ))  # fmt: skip
    except TrainingStopped as stop:
        return results, weights_of(model), str(stop)
    return results, weights_of(model), ""


def test_two_data_ranks_step_as_one_process() -> None:
    expected, weights, _ = stepped(Mesh.single(), 3, None)
    for results, found, _ in run_ranks(stepped, Layout(world=2), 3, None):
        for mine, its in zip(results, expected, strict=True):
            assert (mine.tokens, mine.trained) == (its.tokens, its.trained)
            assert mine.loss == pytest.approx(its.loss, rel=1e-6)
            assert mine.grad_norm == pytest.approx(its.grad_norm, rel=1e-5)
        for name, its in weights.items():
            np.testing.assert_allclose(found[name], its, atol=2e-6, err_msg=name)


def test_figures_are_the_same_numbers_on_all_ranks() -> None:
    first, second = run_ranks(stepped, Layout(world=2), 2, None)
    assert [(r.loss, r.grad_norm) for r in first[0]] == [(r.loss, r.grad_norm) for r in second[0]]


def test_tensor_ranks_do_not_count_twice() -> None:
    (expected,), _, _ = stepped(Mesh.single(), 1, None)
    for (result,), _, _ in run_ranks(stepped, Layout(world=2, tensor=2), 1, None):
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)
        assert result.tokens == expected.tokens


def test_what_is_not_finite_on_one_rank_stops_all_of_them() -> None:
    before = weights_of(make_model(sparse=False))
    for rank, (results, weights, why) in enumerate(run_ranks(stepped, Layout(world=2), 1, 1)):
        assert not results and why.startswith("the loss is"), rank
        if rank == 0:
            assert all((weights[name] == before[name]).all() for name in before)
