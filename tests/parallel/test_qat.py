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
from erniekit.training.assemble import router_upkeep
from erniekit.training.state import Memory, load_memory, load_optimizer
from erniekit.training.step import train_step
from tests.parallel.equal import Case, Outcome, assert_equal, batches_of, together, train
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import packed_row, steps_of, write_model
from tests.parallel.test_checkpoints import checkpoints

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16, "moe_intermediate_size": 64,
}  # fmt: skip
KEYS: dict[str, Any] = {"stage": "SFT", "compute_type": "fp8", "fp8_emulate": True, "apply_online_actscale_step": 2}
ROUNDED: dict[str, Any] = {"recompute": True, "quant_input_grad": True, "quant_weight_grad": True}
MOMENTS: dict[str, Any] = {"use_lowprecision_moment": False, "adam_epsilon": 1e-4}  # else last digits are enlarged
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


def _live(mesh: Mesh, case: Case, out: Path, steps: slice) -> tuple[Scales, Scales, list[float]]:
    """Go on from where the last life saved, and save: scales as they were found and left, and the losses."""
    weights, saving = checkpoints(mesh, case, out)
    checkpoint = out / f"checkpoint-{steps.start}" if steps.start else None
    model = weights.build(checkpoint)
    fp8, objective = assemble.assemble_fp8(model, case.cfg, mesh=mesh), case.objective(mesh)
    optimizer, upkeep = assemble.assemble_optimizer(model, case.cfg, mesh=mesh), router_upkeep(model, case.cfg)
    assert fp8 and fp8.memory
    if checkpoint:
        load_optimizer(checkpoint, optimizer, model, mesh)
        load_memory(checkpoint, fp8.memory, model, mesh)
    found, losses = _copied(fp8.memory), []
    model.train()
    with mock.patch.object(qat, "straight_through", _unrounded):
        for step in case.steps[steps]:
            made = train_step(
                model, optimizer, batches=batches_of(step, mesh), objective=objective, upkeep=upkeep, mesh=mesh,
                learning_rate=case.rate, row_length=1024,
            )  # fmt: skip
            fp8.after_update()
            losses.append(made.loss)
    saving.save(model, optimizer, step=steps.stop, progress={}, memory=fp8.memory)
    return found, _copied(fp8.memory), losses


def _copied(memory: Memory) -> Scales:
    return {name: tensor.numpy().copy() for name, tensor in memory.state().items()}


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


@pytest.mark.parametrize("between", [TENSOR, EXPERTS, OVER_TENSOR], ids=["TP2", "EP2", "experts over TP2"])
def test_scales_go_from_layout_to_layout(models: dict[str, Path], tmp_path: Path, between: Layout) -> None:
    """One process, two ranks, one process: what one saved is what the other finds, bit for bit, and goes on from."""
    case, saved = _case(models["sparse"], **MOMENTS), dict[str, np.ndarray]()
    _, never_stopped, wanted = _live(Mesh.single(), case, tmp_path / "whole", slice(0, 5))
    losses: list[float] = []
    for layout, steps in ((Layout(), slice(0, 2)), (between, slice(2, 3)), (Layout(), slice(3, 5))):
        if layout.world == 1:
            parts = [_live(Mesh.single(), case, tmp_path / "out", steps)]
        else:
            parts = run_ranks(_live, layout, case, tmp_path / "out", steps)
        for found, left, of_steps in parts:
            for name, array in saved.items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)
            for name, array in parts[0][1].items():
                np.testing.assert_array_equal(left[name], array, err_msg=name)
            assert of_steps == parts[0][2]
        saved = parts[0][1]
        losses += parts[0][2]
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert saved.keys() == never_stopped.keys()
    for name, array in never_stopped.items():
        np.testing.assert_allclose(saved[name], array, rtol=2e-5, err_msg=name)
