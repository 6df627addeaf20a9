"""That a layout trains as one process does: loss, every gradient, the weights after some steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from erniekit.config.layout import Layout
from tests.parallel.equal import Case, assert_parallel_equals_single
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers, tied."""
    return write_model(tmp_path_factory.mktemp("models") / "dense", sparse=False)


def test_data_ranks(dense: Path) -> None:
    assert_parallel_equals_single(Case(dense, steps_of(packed_row), {"stage": "SFT"}), Layout(2))


def test_data_ranks_with_adapters_and_preferences(dense: Path) -> None:
    keys = {"stage": "DPO", "fine_tuning": "LoRA"}
    assert_parallel_equals_single(Case(dense, steps_of(pair_row), keys), Layout(2))
