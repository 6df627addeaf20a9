"""FP8 runs of two ranks in which one alone meets a number that is not finite: both end with the same error, which names
the module, and keep the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddle
import pytest

from erniekit.models import layers
from erniekit.training import loop
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import log_of, run_ranked

KEYS: dict[str, Any] = {
    "compute_type": "fp8", "fp8_emulate": "true", "eval_dataset_path": None, "max_steps": 3,
    "gradient_accumulation_steps": 1, "save_steps": 1, "quant_input_grad": "true", "apply_online_actscale_step": 0,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {}, "TP2": {"tensor_parallel_degree": 2}, "EP2": {"expert_parallel_degree": 2}
}  # fmt: skip


class Spoilt(paddle.autograd.PyLayer):
    """The identity, or with one number that is not finite, forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, where: str) -> paddle.Tensor:
        ctx.where = where
        return _spoilt(x) if where == "forward" else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return _spoilt(grad) if ctx.where == "backward" else grad


def _spoilt(x: paddle.Tensor) -> paddle.Tensor:
    flat = x.detach().clone().reshape([-1])
    flat[3] = float("nan")
    return flat.reshape(x.shape)


def spoil(rank: int, where: str) -> None:
    """From rank 1's second step on, what enters the down projections of MLPs is not finite, or what comes back to their
    gates is not. Both ranks have the same graph: their collectives come in its order."""
    taken, step, swiglu = [], loop.train_step, layers.swiglu

    def train_step(*args: Any, **how: Any) -> Any:
        taken.append(1)
        return step(*args, **how)

    def spoilt(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
        bad = rank == 1 and len(taken) > 1
        y = swiglu(Spoilt.apply(gate, "backward" if bad and where == "gradient" else ""), up)
        return Spoilt.apply(y, "forward" if bad and where == "input" else "")

    loop.train_step, layers.swiglu = train_step, spoilt


@pytest.mark.parametrize(
    ("recipe", "layout", "where"),
    [
        ("blockwise", "EP2", "input"), ("blockwise", "TP2", "gradient"), ("qat", "TP2", "input"),
        ("qat", "DP2", "gradient"),
    ],
)  # fmt: skip
def test_what_one_rank_sees_ends_all(wide: Bench, tmp_path: Path, recipe: str, layout: str, where: str) -> None:
    out = tmp_path / "out"
    config = wide.config(out, **KEYS, **LAYOUTS[layout], fp8_recipe=recipe)
    first, second = run_ranked(config, 2, {}, prepare=lambda rank: spoil(rank, where), seconds=100)
    told = {
        "input": "the input of model.layers.0.mlp.down_proj",
        "gradient": "the gradient of the output of model.layers.2.mlp.shared_experts.gate_proj",  # met on the way back
    }[where]  # fmt: skip
    assert first == second and first.startswith("TrainingStopped: step 2: the loss is "), (first, second)
    for words in (f"; {told} holds NaN or infinity", "checkpoint-1 stands", "compute_type: bf16"):
        assert words in first, first
    assert [row["step"] for row in log_of(out) if "loss" in row] == [1]
    kept = json.loads((out / "replay" / "step-2" / "training" / "replay.json").read_text())
    assert f"{told} holds" in kept["reason"]
