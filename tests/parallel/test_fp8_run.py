"""FP8 runs of two ranks, from their config to the model folder, beside one process with the rows of both.

Two things set them apart. Sums in another order differ in fp32's last digits. And a number that they move across the
middle between two codes is rounded to the other one, 6 % away, which more and more numbers are as weights differ. So
they are compared twice. Without rounding (unrounded.py) the first is all there is, and they agree in fp32's digits for
all five steps. With it, they are as far apart as two runs of one process may be that start one bit of fp32 apart: the
largest of two such controls, twice. In their first step they have equal weights, and are nearer than controls.

As measured, the largest relative difference of the losses of steps 2 to 5 (each layout; four controls):
    blockwise   TP2 1.6e-4, EP2 and stage3 5.0e-5; controls 1.6e-4 to 2.0e-4
    qat         TP2 1.2e-4, EP2 1.4e-4;            controls 1.4e-4 to 3.7e-4
What ranks must agree on number by number is compared in test_qat.py and test_blockwise.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from erniekit.recipes import train
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked
from tests.parallel.unrounded import casts_off, nudged

KEYS: dict[str, Any] = {
    "compute_type": "fp8", "fp8_emulate": "true", "max_steps": 5, "save_strategy": "no", "eval_dataset_path": None,
    "gradient_accumulation_steps": 1, "apply_online_actscale_step": 2, "logging_steps": 5, "packing": "false",
    "use_lowprecision_moment": "false", "adam_epsilon": "1e-4",  # else the optimizer rounds, or enlarges last digits
}  # fmt: skip
LAYOUTS = {
    "TP2": {"tensor_parallel_degree": 2, "sequence_parallel": "true", "batch_size": 4},
    "EP2": {"expert_parallel_degree": 2, "batch_size": 2},
    "stage3": {"sharding": "stage3", "sharding_parallel_degree": 2, "batch_size": 2},  # lets go of weights by layer
}
RECIPES = ("blockwise", "qat")
FIGURES = ("loss", "grad_norm")

Rows = list[dict[str, Any]]


@dataclass
class Alone:
    """The runs of one process by a recipe: as it is, without rounding, and the controls."""

    recipe: str
    rows: Rows
    unrounded: Rows
    controls: list[Rows]


@pytest.fixture(scope="module", params=RECIPES)
def alone(request: pytest.FixtureRequest, wide: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp(f"alone-{request.param}")

    def rows(name: str) -> Rows:
        train(wide.config(folder / name, **KEYS, batch_size=4, fp8_recipe=request.param))
        return log_of(folder / name)

    made = Alone(request.param, rows("plain"), [], [])
    with pytest.MonkeyPatch.context() as patch:
        casts_off(patch)
        made.unrounded = rows("unrounded")
    for seed in range(2):
        with pytest.MonkeyPatch.context() as patch:
            nudged(patch, seed)
            made.controls.append(rows(f"control-{seed}"))
    yield made


def apart(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each figure."""
    assert len(found) == len(wanted) and all(a["tokens"] == b["tokens"] for a, b in zip(found, wanted, strict=True))
    return {
        name: max(abs(a[name] / b[name] - 1) for a, b in zip(found, wanted, strict=True)) for name in FIGURES
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["TP2", "EP2"])
def test_without_rounding_two_ranks_train_as_one(
    alone: Alone, wide: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    casts_off(monkeypatch)  # in the ranks, too: they are forked
    config = wide.config(tmp_path / layout, **{**KEYS, **LAYOUTS[layout]}, fp8_recipe=alone.recipe)
    assert run_ranked(config, 2, {}, seconds=240) == ["", ""]
    found = log_of(tmp_path / layout)
    assert len(found) == 5 and max(apart(found, alone.unrounded).values()) < 1e-6
    assert apart(found, alone.rows)["loss"] > 1e-5  # rounding was off


@pytest.mark.parametrize(
    ("alone", "layout"),
    [(recipe, layout) for recipe in RECIPES for layout in LAYOUTS if (recipe, layout) != ("qat", "stage3")],
    indirect=["alone"],
)
def test_two_ranks_are_no_further_from_one_than_a_bit_of_the_weights(
    alone: Alone, wide: Bench, tmp_path: Path, layout: str
) -> None:
    config = wide.config(tmp_path / layout, **{**KEYS, **LAYOUTS[layout]}, fp8_recipe=alone.recipe)
    assert run_ranked(config, 2, {}, seconds=240) == ["", ""]
    found = log_of(tmp_path / layout)
    assert len(found) == 5
    assert apart(found[:1], alone.rows[:1])["loss"] < 1e-5
    later, controls = apart(found[1:], alone.rows[1:]), [apart(rows[1:], alone.rows[1:]) for rows in alone.controls]
    for name in FIGURES:
        assert later[name] <= 2 * max(control[name] for control in controls), name
    assert max(control["loss"] for control in controls) < 1e-3
    assert found[-1]["fp8_amax"] == pytest.approx(alone.rows[-1]["fp8_amax"], rel=0.05)
