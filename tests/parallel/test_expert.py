"""Experts on many ranks against one process that holds them all: loss and every gradient."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.data.batch import Batch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.expert import use_expert_parallel
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.part import hold_part
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.step import Totals
from tests.parallel.ranks import run_ranks

EXPERTS, CHOSEN, LENGTH = 8, 3, 16


def make_model(**changes: int) -> ErnieForCausalLM:
    """Two sparse layers over one dense; always the same weights, and a router that prefers some experts."""
    settings = {
        "model_type": "ernie4_5_moe", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "moe_num_experts": EXPERTS, "moe_k": CHOSEN, "moe_intermediate_size": 8, "moe_layer_start_index": 1,
        "moe_layer_end_index": 2, "moe_num_shared_experts": 1,
    }  # fmt: skip
    model = ErnieForCausalLM(ErnieConfig(**settings | changes))
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters():
        drawn = rng.normal(0, 0.3, p.shape).astype("float32")
        p.set_value(1 + drawn if "norm" in name else drawn)
    return model


def make_batch(rows: int) -> Batch:
    """Rows of two documents and some padding, all different; row 1 is padding but for its first tokens."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 48, (rows, LENGTH))
    segments = np.where(np.arange(LENGTH) < 9, 1, 2) * np.ones((rows, 1), int)
    segments[:, LENGTH - 2 :] = 0
    segments[1, 3:] = 0
    labels = np.where(segments > 0, np.roll(ids, -1, 1), -100)
    positions = np.where(np.arange(LENGTH) < 9, np.arange(LENGTH), np.arange(LENGTH) - 9) * np.ones((rows, 1), int)
    return Batch(ids, labels, positions, segments)


def rows_of(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows], batch.segment_ids[rows])


def of_rank(name: str, whole: np.ndarray, cut: Cut) -> np.ndarray:
    """What a rank holds of a parameter of which only experts are cut."""
    if ".experts." not in name:
        return whole
    held = cut.experts(EXPERTS)
    return whole[held.start : held.stop]


def part_of(model: ErnieForCausalLM, mesh: Mesh) -> ErnieForCausalLM:
    """The same model with this rank's experts."""
    cut = Cut.of(mesh.layout, mesh.rank)
    mine = {name: of_rank(name, p.numpy(), cut) for name, p in model.named_parameters()}
    part = ErnieForCausalLM(model.config)
    hold_part(part, {name: array.shape for name, array in mine.items()})
    for name, p in part.named_parameters():
        p.set_value(mine[name])
    use_expert_parallel(part, mesh)
    return part


def learn(model: ErnieForCausalLM, batch: Batch, totals: Totals) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and every gradient."""
    made = LanguageModelObjective(LossWeights())(model, batch, totals)
    made.total.backward()
    return float(made.total), {n: p.grad.numpy() for n, p in model.named_parameters() if not p.stop_gradient}


def on_rank(mesh: Mesh, model: ErnieForCausalLM, batch: Batch, each: int) -> tuple[float, dict[str, np.ndarray]]:
    at = mesh.coordinates
    own = rows_of(batch, slice(at.data * each, (at.data + 1) * each))
    loss, grads = learn(part_of(model, mesh), own, Totals.of([batch], row_length=LENGTH))
    data, copies = mesh.axis("data"), mesh.axis("expert_copies")
    for name, grad in grads.items():
        axis = copies if ".experts." in name else data
        grads[name] = axis.all_reduce(paddle.to_tensor(grad)).numpy()
    return float(data.all_reduce(paddle.to_tensor(loss))), grads


def assert_equal(layout: Layout, *, each: int = 2) -> None:
    model, batch = make_model(), make_batch(each * layout.data)
    ranks = run_ranks(on_rank, layout, model, batch, each)
    loss, grads = learn(model, batch, Totals.of([batch], row_length=LENGTH))
    for rank, (found, own) in enumerate(ranks):
        assert found == pytest.approx(loss, rel=1e-6)
        assert own.keys() == grads.keys()
        for name, whole in grads.items():
            wanted = of_rank(name, whole, Cut.of(layout, rank))
            scale = np.abs(whole).max()
            assert scale > 0 or "mtp" in name, name
            assert np.abs(own[name] - wanted).max() <= 1e-5 * scale, f"{name} of rank {rank}"


@pytest.mark.parametrize("layout", [Layout(2, expert=2), Layout(4, expert=4), Layout(4, expert=2)], ids=str)
def test_experts_over_data_ranks(layout: Layout) -> None:
    assert_equal(layout)


@pytest.mark.parametrize("layout", [Layout(2, tensor=2, expert=2, experts_over="tensor")], ids=str)
def test_experts_over_tensor_ranks(layout: Layout) -> None:
    assert_equal(layout)
