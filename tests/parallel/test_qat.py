"""Quantisation-aware training over ranks: as in one process, the scales too.

A sum in another order is off by 1e-7, which sometimes takes a number over the middle between two FP8 numbers: then it
is off by 6 %, in one place. So what ranks have to agree on is compared number by number while products are not rounded
(their scales are made all the same), and with rounding losses and scales are close.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle
import pytest

from erniekit.config.layout import Layout
from erniekit.ops.grouped import grouped_linear
from erniekit.parallel.mesh import Mesh
from erniekit.precision import qat
from erniekit.training import assemble
from tests.parallel.equal import Case, Outcome, assert_equal, together, train
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import packed_row, steps_of, write_model

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16, "moe_intermediate_size": 64,
}  # fmt: skip
KEYS: dict[str, Any] = {"stage": "SFT", "compute_type": "fp8", "fp8_emulate": True, "apply_online_actscale_step": 2}
ROUNDED: dict[str, Any] = {"recompute": True, "quant_input_grad": True, "quant_weight_grad": True}
TENSOR, EXPERTS = Layout(2, tensor=2, sequence_parallel=True), Layout(2, expert=2, sharding=2, stage=2)
OVER_TENSOR = Layout(2, tensor=2, expert=2, experts_over="tensor")
Scales = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layers without experts and with them."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"dense": False, "sparse": True}
    return {kind: write_model(folder / kind, sparse=sparse, spread=0.05, **SIZES) for kind, sparse in kinds.items()}


def _unrounded(x: paddle.Tensor, weight: paddle.Tensor, codes: qat.Float8, *_: Any, **__: Any) -> paddle.Tensor:
    return paddle.matmul(x, weight) if weight.ndim == 2 else grouped_linear(x, weight, counts=codes.counts)


def _train(mesh: Mesh, cases: Sequence[Case], *rounds: bool) -> list[tuple[Outcome, Scales]]:
    return [_trained(mesh, case, rounds=rounds[0]) for case in cases]


def _case(folder: Path, **keys: Any) -> Case:
    """Five steps: two with current scales, three with kept ones."""
    return Case(folder, steps_of(packed_row, steps=5, micro_batches=1), {**KEYS, **keys}, rate=0.01)


def _trained(mesh: Mesh, case: Case, *, rounds: bool) -> tuple[Outcome, Scales]:
    """What training gave, and the scales: kept ones of inputs, and those of the weights as they are in the end."""
    product = nullcontext() if rounds else mock.patch.object(qat, "straight_through", _unrounded)
    kept: list[qat.QatTraining] = []
    with product, mock.patch.object(assemble, "use_qat", lambda *a, **k: kept.append(qat.use_qat(*a, **k)) or kept[0]):
        outcome = train(mesh, case)
    (memory,) = kept
    scales = {name: tensor.numpy().astype(np.float64) for name, tensor in memory.state().items()}
    for name, group in memory.groups.items():
        found = np.zeros(len(scales[f"activation_scale/{name}"]))
        found[group.held] = group.weight(0).scales.numpy().ravel()
        scales[f"weight/{name}"] = found
    return outcome, scales


def _over(parts: list[Scales], name: str) -> np.ndarray:
    """A scale as all ranks have it; of weights, each its experts'."""
    if name.startswith("weight/"):
        return np.max([part[name] for part in parts], axis=0)
    for part in parts[1:]:
        assert np.array_equal(part[name], parts[0][name]), name
    return parts[0][name]


@pytest.mark.parametrize("layout", [TENSOR, EXPERTS, OVER_TENSOR])
def test_ranks_agree_on_scales(models: dict[str, Path], layout: Layout) -> None:
    case = _case(models["sparse"])
    parts = [of_rank[0] for of_rank in run_ranks(_train, layout, [case], False)]
    outcome, scales = _trained(Mesh.single(), case, rounds=False)
    case.__dict__["alone"] = together(case, Layout(), [outcome])
    assert_equal(case, layout, together(case, layout, [part[0] for part in parts]))
    for key, expected in scales.items():
        np.testing.assert_allclose(_over([part[1] for part in parts], key), expected, rtol=2e-6, err_msg=key)


@pytest.mark.parametrize(("layout", "kind"), [(TENSOR, "dense"), (EXPERTS, "sparse")])
def test_five_steps_are_those_of_one_process(models: dict[str, Path], layout: Layout, kind: str) -> None:
    case = _case(models[kind], **ROUNDED)
    parts = [of_rank[0] for of_rank in run_ranks(_train, layout, [case], True)]
    outcome, scales = _trained(Mesh.single(), case, rounds=True)
    found = together(case, layout, [part[0] for part in parts])
    for mine, its in zip(found.figures, outcome.figures, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4)
    for key, expected in scales.items():
        np.testing.assert_allclose(_over([part[1] for part in parts], key), expected, rtol=0.01, err_msg=key)
