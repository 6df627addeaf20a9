"""FP8 runs of two ranks, from their config to the model folder: those of one process with the rows of both.

What is summed in another order may be rounded to the next number, which is 6 % away in E4M3, in one place of a product.
The first loss shows hardly any of it; from then on weights differ, and more places with them. (What ranks must agree on
number by number is compared in test_qat.py and test_blockwise.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erniekit.checkpoint.create import create
from erniekit.config.families import FAMILIES
from erniekit.recipes import train
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked

SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 32}
KEYS: dict[str, Any] = {
    "compute_type": "fp8", "fp8_emulate": "true", "max_steps": 5, "save_strategy": "no", "eval_dataset_path": None,
    "gradient_accumulation_steps": 1, "apply_online_actscale_step": 2, "logging_steps": 5, "packing": "false",
}  # fmt: skip
LAYOUTS = {
    "TP2": {"tensor_parallel_degree": 2, "sequence_parallel": "true", "batch_size": 4},
    "EP2": {"expert_parallel_degree": 2, "batch_size": 2},
    "stage3": {"sharding": "stage3", "sharding_parallel_degree": 2, "batch_size": 2},  # lets go of weights by layer
}


@pytest.fixture(scope="module")
def wide(bench: Bench) -> Bench:
    """The micro model with sizes of which blocks of 128 divide even the half, and the same data."""
    made = Bench(bench.folder / "for-ranks")
    made.folder.mkdir()
    (made.folder / "train.jsonl").write_bytes((bench.folder / "train.jsonl").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "micro-moe", {**FAMILIES["micro-moe"], **SIZES})
        create("micro-moe", made.model, tokenizer_texts=[made.folder / "train.jsonl"])
    return made


@pytest.fixture(scope="module", params=["blockwise", "qat"])
def alone(
    request: pytest.FixtureRequest, wide: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A recipe, and the rows of a run of one process."""
    out = tmp_path_factory.mktemp("alone") / request.param
    train(wide.config(out, **KEYS, batch_size=4, fp8_recipe=request.param))
    yield request.param, log_of(out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one(alone: tuple[str, list[dict[str, Any]]], wide: Bench, tmp_path: Path, layout: str):
    recipe, rows = alone
    if (recipe, layout) == ("qat", "stage3"):
        pytest.skip("excluded by the config")
    config = wide.config(tmp_path / layout, **KEYS, **LAYOUTS[layout], fp8_recipe=recipe)
    assert run_ranked(config, 2, {}, seconds=120) == ["", ""]
    found = log_of(tmp_path / layout)
    assert len(found) == len(rows) == 5
    for own, row in zip(found, rows, strict=True):
        assert own["tokens"] == row["tokens"]
        assert own["loss"] == pytest.approx(row["loss"], rel=1e-5 if row["step"] == 1 else 1e-3), row["step"]
        assert own["grad_norm"] == pytest.approx(row["grad_norm"], rel=5e-3), row["step"]
    assert found[-1]["fp8_amax"] == pytest.approx(rows[-1]["fp8_amax"], rel=0.05)
