"""Tensor and sequence parallelism: ranks that hold parts of every matrix, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erniekit.config.layout import Layout
from tests.parallel.equal import Case, assert_parallel_equals_single
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

TWO, FOUR = Layout(2, tensor=2), Layout(4, tensor=4)
TWO_IN_PARTS, FOUR_IN_PARTS = (Layout(n, tensor=n, sequence_parallel=True) for n in (2, 4))
EXPERTS_TOO = Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True)
LORA = {"fine_tuning": "LoRA", "lora_rank": 4}
DORA = {**LORA, "dora": True, "lora_target_modules": ["attention", "mlp"]}
EXTRA: dict[Layout, list[dict[str, Any]]] = {
    TWO: [{**LORA, "lora_init": "pissa", "lora_rank": 2}, {**DORA, "compute_type": "wint4/8"}],
    FOUR: [{**DORA, "modules_to_save": ["embed_tokens", "norm"]}],
    TWO_IN_PARTS: [LORA, {"recompute": True}],
    FOUR_IN_PARTS: [],
    EXPERTS_TOO: [{**LORA, "compute_type": "wint4/8", "moe_aux_loss_lambda": 0.01, "moe_orthogonal_loss_lambda": 0.01}],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense, tied, with biases; experts, a head of its own, prediction ahead. Both have 2 key heads."""
    folder = tmp_path_factory.mktemp("models")
    dense = write_model(folder / "dense", sparse=False, head_bias=True, use_bias=True, tie_word_embeddings=True)
    ahead = {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}
    return dense, write_model(folder / "sparse", sparse=True, **ahead)


@pytest.mark.parametrize("layout", EXTRA, ids=["2", "4", "2 in parts", "4 in parts", "2 with experts"])
def test_ranks_with_parts_of_a_model_equal_one_process(models: tuple[Path, Path], layout: Layout) -> None:
    dense, sparse = models
    packed, pairs = steps_of(packed_row, rows=2), steps_of(pair_row, rows=2)
    cases = [Case(folder, packed, {"stage": "SFT"}, rate=0.02) for folder in models]
    cases += [Case(dense, pairs, {"stage": "DPO", "loss_type": "simpo"})]
    cases += [Case(sparse, packed, {"stage": "SFT", **keys}, rate=0.02) for keys in EXTRA[layout]]
    assert_parallel_equals_single(cases, layout)
