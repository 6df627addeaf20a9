"""Tensor and sequence parallelism: ranks that hold parts of every matrix, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erniekit.config.layout import Layout
from tests.parallel.equal import Case, assert_parallel_equals_single
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

TWO, FOUR = Layout(2, tensor=2), Layout(4, tensor=4)
TWO_SP, FOUR_SP = Layout(2, tensor=2, sequence_parallel=True), Layout(4, tensor=4, sequence_parallel=True)


@pytest.mark.parametrize("layout", [TWO, FOUR, TWO_SP, FOUR_SP], ids=["2", "4", "2sp", "4sp"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_ranks_with_parts_of_a_model_equal_one_process(tmp_path: Path, kind: str, layout: Layout) -> None:
    """Tied and with biases, or with a head and with experts; 2 key heads on 2 and on 4 ranks."""
    changes = {
        "dense": {"tie_word_embeddings": True, "use_bias": True},
        "sparse": {"tie_word_embeddings": False, "num_nextn_predict_layers": 1},
    }[kind]
    folder = write_model(tmp_path / "m", sparse=kind == "sparse", head_bias=kind == "dense", **changes)
    assert_parallel_equals_single(Case(folder, steps_of(packed_row, rows=2), {"stage": "SFT"}, rate=0.02), layout)


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        (FOUR, {"dora": True, "lora_target_modules": ["attention", "mlp"], "modules_to_save": ["embed_tokens"]}),
        (TWO_SP, {}),
        (TWO, {"lora_init": "pissa", "lora_rank": 2}),
        (TWO, {"compute_type": "wint4/8", "dora": True, "lora_target_modules": ["attention", "mlp"]}),
    ],
    ids=["dora on 4", "lora on 2sp", "pissa on 2", "packed on 2"],
)
def test_adapters(tmp_path: Path, layout: Layout, keys: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "m", sparse=True, num_nextn_predict_layers=1)
    keys = {"stage": "SFT", "fine_tuning": "LoRA", "lora_rank": 4, **keys}
    assert_parallel_equals_single(Case(folder, steps_of(packed_row, rows=2), keys), layout)


@pytest.mark.parametrize("layout", [TWO, TWO_SP], ids=["2", "2sp"])
def test_preferences(tmp_path: Path, layout: Layout) -> None:
    folder = write_model(tmp_path / "m", sparse=False)
    keys = {"stage": "DPO", "loss_type": "simpo"}
    assert_parallel_equals_single(Case(folder, steps_of(pair_row, rows=2), keys), layout)
