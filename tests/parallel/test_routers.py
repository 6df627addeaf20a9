"""What is counted and measured of routers on several ranks is what one process counts and measures."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.config.layout import Layout
from erniekit.models.moe import Routing
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tokens import TokenRanks
from erniekit.training.health import RouterHealth
from erniekit.training.router import RouterUpkeep, sparse_blocks, sparse_layers
from tests.parallel.ranks import run_ranks
from tests.unit.training.micro import make_model

ROWS, POSITIONS, EXPERTS = 4, 6, 4
PARTS = Layout(4, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True)


def looked_at(mesh: Mesh) -> dict[str, object]:
    """The figures of a step of two micro-batches; the first data rank has less padding than the last."""
    model, ranks, rng = make_model(), TokenRanks(mesh), np.random.default_rng(4)
    health = RouterHealth(sparse_layers(model), experts_per_token=2, window=1, ranks=ranks)
    upkeep = RouterUpkeep(model, bias_coefficient=0.25, orthogonal_lambda=0.0, health=health, ranks=ranks)
    health.begin(0, last=False)
    for _ in range(2):
        logits_BSE = rng.normal(0, np.arange(ROWS)[:, None, None], (ROWS, POSITIONS, EXPERTS)).astype("float32")
        mask_BS = np.arange(POSITIONS) < np.array([6, 5, 3, 0])[:, None]
        rows, positions = mesh.axis("data").share(ROWS), slice(None)
        if mesh.layout.sequence_parallel:
            positions = mesh.axis("tensor").share(POSITIONS)
        logits_ME = paddle.to_tensor(logits_BSE[rows, positions]).reshape([-1, EXPERTS])
        routing = Routing(logits_ME, paddle.topk(logits_ME, 2)[1], paddle.ones([len(logits_ME), 2]))
        upkeep.count([routing], ranks.seen(paddle.to_tensor(mask_BS[rows])))
    found = {**upkeep.after_optimizer(), **health.report(1)}
    biases = [block.moe_statics.e_score_correction_bias.numpy().tolist() for block in sparse_blocks(model)]
    return found | {"biases": biases}


@pytest.mark.parametrize("layout", [Layout(2), Layout(4), Layout(4, tensor=2), PARTS], ids=str)
def test_figures_of_all_tokens_are_on_every_rank(layout: Layout) -> None:
    expected = looked_at(Mesh.single())
    for found in run_ranks(looked_at, layout):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
