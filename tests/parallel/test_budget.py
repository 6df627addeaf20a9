"""The budget of a rank against Paddle's account of its tensors, in a step that is not the first."""

from __future__ import annotations

import numpy as np
import pytest
from paddle.base import core

from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.data.batch import Document, Row
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import assemble_optimizer, router_upkeep
from erniekit.training.budget import run_budget
from erniekit.training.step import train_step
from tests.parallel.equal import Case, batches_of
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import write_model

LENGTH, ROWS = 256, 2


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A mixture of experts on full rows."""
    folder = write_model(
        tmp_path_factory.mktemp("models") / "sparse", sparse=True, hidden_size=128, intermediate_size=320, head_dim=32,
        moe_intermediate_size=96,
    )  # fmt: skip
    keys = {
        "stage": "SFT", "batch_size": ROWS, "max_seq_len": LENGTH, "packing": False, "moe_health_steps": 0,
        "recompute": True, "sharding_comm_buffer_size_MB": 1,
    }  # fmt: skip
    return Case(folder, [], keys)


def measured(mesh: Mesh, case: Case) -> tuple[int, int]:
    """The peak of this rank, and its budget."""
    rng = np.random.default_rng(mesh.coordinates.data)
    rows = [
        Row((Document("text", *rng.integers(3, case.arch.vocab_size, (2, LENGTH))),))
        for _ in range(ROWS * mesh.layout.data)
    ]
    before = core.host_memory_stat_current_value("Allocated", 0)
    model, objective = case.model(mesh), case.objective(mesh)
    model.train()
    optimizer, upkeep = assemble_optimizer(model, case.cfg, mesh=mesh), router_upkeep(model, case.cfg, mesh=mesh)
    for _ in range(2):
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        train_step(
            model, optimizer, batches=batches_of([rows], mesh), objective=objective, upkeep=upkeep, mesh=mesh,
            learning_rate=1e-3, row_length=LENGTH,
        )  # fmt: skip
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    cut = Cut.of(mesh.layout, mesh.rank)
    return peak, run_budget(case.cfg, case.arch, lengths=[LENGTH], cut=cut).peak


@pytest.mark.parametrize("layout", [
    Layout(2), Layout(2, sharding=2, stage=1), Layout(2, sharding=2, stage=2), Layout(2, sharding=2, stage=3),
    Layout(2, tensor=2), Layout(2, tensor=2, sequence_parallel=True), Layout(2, expert=2),
], ids=["data", "states", "gradients", "weights", "tensor", "sequences", "experts"])  # fmt: skip
def test_the_peak_of_ranks(case: Case, layout: Layout) -> None:
    """Of all ranks together: with experts on ranks, one has more tokens than another. Of the stand-ins for collectives
    that only CPUs need, the budget knows those of experts; at stage 3 it takes the two largest layers to be whole."""
    peaks, budgets = zip(*run_ranks(measured, layout, case), strict=True)
    assert sum(budgets) == pytest.approx(sum(peaks), rel=0.1)
