"""Tensor and sequence parallelism: ranks that hold parts of every matrix, against one process."""

from __future__ import annotations

from typing import Any

import pytest

from erniekit.config.layout import Layout
from tests.parallel.equal import Case, Runs
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

LORA = {"fine_tuning": "LoRA", "lora_rank": 4}
DORA = {**LORA, "dora": True, "lora_target_modules": ["attention", "mlp"]}
ROUTERS = {"moe_aux_loss_lambda": 0.01, "moe_orthogonal_loss_lambda": 0.01}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {},
    "recomputed": {"recompute": True},
    "adapters": LORA,
    "pissa": {**LORA, "lora_init": "pissa", "lora_rank": 2},
    "dora on few bits": {**DORA, "compute_type": "wint4/8"},
    "dora and whole modules": {**DORA, "modules_to_save": ["embed_tokens", "norm"]},
    "adapters on few bits": {**LORA, "compute_type": "wint4/8", **ROUTERS},
}
EVERYWHERE = ("dense", "experts", "pairs")
TABLE: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "2": (Layout(2, tensor=2), (*EVERYWHERE, "pissa", "dora on few bits")),
    "4": (Layout(4, tensor=4), (*EVERYWHERE, "dora and whole modules")),
    "2 in parts": (Layout(2, tensor=2, sequence_parallel=True), (*EVERYWHERE, "adapters", "recomputed")),
    "4 in parts": (Layout(4, tensor=4, sequence_parallel=True), EVERYWHERE),
    "2 with experts": (
        Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True),
        (*EVERYWHERE, "adapters on few bits"),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of two models, both with 2 key heads: dense, tied, with biases; experts, a head of its own, prediction ahead."""
    folder = tmp_path_factory.mktemp("models")
    dense = write_model(folder / "dense", sparse=False, head_bias=True, use_bias=True, tie_word_embeddings=True)
    ahead = {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}
    sparse = write_model(folder / "sparse", sparse=True, **ahead)
    packed, pairs = steps_of(packed_row, rows=2), steps_of(pair_row, rows=2)
    return Runs({
        "dense": Case(dense, packed, {"stage": "SFT"}, rate=0.02),
        "pairs": Case(dense, pairs, {"stage": "DPO", "loss_type": "simpo"}),
        **{name: Case(sparse, packed, {"stage": "SFT", **keys}, rate=0.02) for name, keys in OF_EXPERTS.items()},
    })


@pytest.mark.parametrize(("layout", "case"), [(layout, name) for layout in TABLE for name in TABLE[layout][1]])
def test_ranks_with_parts_of_a_model_equal_one_process(runs: Runs, layout: str, case: str) -> None:
    runs.assert_equal(case, *TABLE[layout])
