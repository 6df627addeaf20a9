"""Experts on many ranks against one process that holds them all: losses, every gradient, weights, statistics."""

from __future__ import annotations

from pathlib import Path

import pytest

from erniekit.config.layout import Layout
from tests.parallel.equal import Case, assert_parallel_equals_single
from tests.parallel.samples import packed_row, steps_of, write_model

ROUTERS = {
    "stage": "SFT", "moe_aux_loss_lambda": 0.5, "moe_z_loss_lambda": 0.3, "moe_orthogonal_loss_lambda": 0.4,
    "moe_use_aux_free": True, "moe_use_aux_free_update_coef": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer and two of four experts, of which no token ever chooses the third."""
    return write_model(tmp_path_factory.mktemp("models") / "sparse", sparse=True, idle=2)


@pytest.mark.parametrize("layout", [Layout(2, expert=2), Layout(4, expert=4), Layout(4, expert=2)], ids=str)
def test_experts_over_data_ranks(sparse: Path, layout: Layout) -> None:
    """With four ranks, one of them gets no token at all."""
    assert_parallel_equals_single(layout, Case(sparse, steps_of(packed_row), ROUTERS))
