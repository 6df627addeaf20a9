"""Preferences over data ranks: a step's samples are those of all of them, and so are held-out ones and the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.config.align import AlignConfig
from erniekit.config.layout import Layout
from erniekit.data.batch import Document, PreferenceBatch
from erniekit.losses.preference import ACROSS
from erniekit.parallel.mesh import Mesh
from erniekit.training.objective import LossWeights
from erniekit.training.preference import PreferenceObjective, answer_log_probs, preference_objective
from erniekit.training.reference import Table
from erniekit.training.step import Totals
from tests.parallel.ranks import run_ranks
from tests.unit.data.trees import batch_of
from tests.unit.training.micro import make_model
from tests.unit.training.test_preference import judgements, moved, pairs, reward_model

CASES = [("DPO", loss_type) for loss_type in ("sigmoid", *sorted(ACROSS))] + [("KTO", "sigmoid"), ("RM", "sigmoid")]
TWO = Layout(world=2)


def objective_of(stage: str, loss_type: str, model, mesh: Mesh) -> PreferenceObjective:
    keys = AlignConfig(loss_type=loss_type, sft_loss_ratio=0.1 if stage == "DPO" else 0.0)
    reference = None if stage == "RM" else moved(model)
    return preference_objective(stage, keys, LossWeights(), reference=reference, mesh=mesh)


def micro_batches(documents: Sequence[Document], mesh: Mesh, *, cut: int) -> list[PreferenceBatch]:
    """One micro-batch of all samples (`cut` 1) or two of as many, of each of which a data rank has its rows."""
    data, size = mesh.axis("data"), len(documents) // cut
    wholes = [documents[i * size : (i + 1) * size] for i in range(cut)]
    return [batch_of(*([document] for document in whole[data.share(size)])) for whole in wholes]


def stepped(mesh: Mesh, cut: int) -> list[dict[str, float]]:
    """For each case the figures of two steps, a gradient and what is measured; each summed over data ranks."""
    found, data = [], mesh.axis("data")
    for stage, loss_type in CASES:
        model = reward_model() if stage == "RM" else make_model()
        objective = objective_of(stage, loss_type, model, mesh)
        documents = judgements() if stage == "KTO" else pairs()
        figures: dict[str, float] = {}
        for step in (1, 2):
            batches = micro_batches(documents, mesh, cut=cut)
            totals = Totals.of(batches, row_length=64).over(data)
            objective.begin(model, batches)
            for batch in batches:
                made = objective(model, batch, totals)
                made.total.backward()
                for name, value in {"loss": made.total, **made.parts}.items():
                    key = f"{name} of step {step}"
                    figures[key] = figures.get(key, 0.0) + float(value)
        grad = model.model.layers[0].self_attn.o_proj.weight.grad
        sums = data.all_reduce(paddle.to_tensor(list(figures.values()), "float64")).tolist()
        figures = dict(zip(figures, sums, strict=True))
        figures["gradient"] = float(data.all_reduce(grad.detach().clone()).norm())
        held = micro_batches(documents, mesh, cut=cut)
        found.append(figures | objective.measure(model, [held])[0])
    return found


@pytest.mark.parametrize("cut", [1, 2])
def test_two_data_ranks_see_a_step_as_one_process_does(cut: int) -> None:
    expected = stepped(Mesh.single(), cut)
    for mine in run_ranks(stepped, TWO, cut):
        for case, found, figures in zip(CASES, mine, expected, strict=True):
            assert found.keys() == figures.keys(), case
            for name, value in figures.items():
                assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-7), (case, name)


def filled(mesh: Mesh, path: Path, forgetful: int | None) -> tuple[int, int, list[float]]:
    """Fill a table in shares: of how many samples that was, how often this rank computed, and all it knows in the end.
    Rank `forgetful` finds no file."""
    model, calls = make_model(), []
    table = Table(None if mesh.rank == forgetful else path)

    def counted():
        calls.append(1)
        return model

    num = table.fill(micro_batches(pairs(), mesh, cut=2), model=counted, mesh=mesh)
    everybodys = micro_batches(pairs(), Mesh.single(), cut=1)[0]
    return num, len(calls), table(model, everybodys).tolist()


def test_a_table_is_filled_in_shares_and_known_to_all(tmp_path: Path) -> None:
    expected = answer_log_probs(make_model(), micro_batches(pairs(), Mesh.single(), cut=1)[0]).tolist()
    for num, calls, values in run_ranks(filled, TWO, tmp_path / "reference.npz", None):
        assert (num, calls) == (4, 2)
        np.testing.assert_allclose(values, expected, rtol=2e-6)
    again = run_ranks(filled, TWO, tmp_path / "reference.npz", None)
    assert [(num, calls) for num, calls, _ in again] == [(0, 0), (0, 0)]


def test_where_one_rank_has_to_compute_all_do(tmp_path: Path) -> None:
    run_ranks(filled, TWO, tmp_path / "reference.npz", None)
    found = run_ranks(filled, TWO, tmp_path / "reference.npz", 1)
    assert [(num, calls) for num, calls, _ in found] == [(2, 2), (2, 2)]
    assert found[0][2] == found[1][2]


def held_back(mesh: Mesh) -> dict[str, float]:
    """What is measured where rank 1 only keeps step in the last batch."""
    model = make_model()
    documents = [*pairs(), *pairs()[:1]]
    data = mesh.axis("data")
    batches = micro_batches(documents[:4], mesh, cut=2)
    batches.append(batch_of([documents[4]]))
    batches[-1].counts = data.index == 0
    return objective_of("DPO", "sigmoid", model, mesh).measure(model, [batches])[0]


def test_a_batch_that_does_not_count_is_worked_through_and_measured_once() -> None:
    expected = held_back(Mesh.single())
    for found in run_ranks(held_back, TWO):
        assert found == pytest.approx(expected, rel=1e-6)
        assert found["eval_samples"] == 5
