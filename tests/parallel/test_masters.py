"""Weights in bf16 with fp32 masters: ranks move them as one process does, bit for bit, and so do routers after a step.

A CPU cannot multiply in bf16. So the loss here is a sum over weights, with factors that make every sum of gradients
exact, and the update is written out.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import paddle
import pytest

from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import Layout
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.moe import Routing
from erniekit.ops.adamw import Update
from erniekit.parallel.layered import LayerShards
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tokens import TokenRanks
from erniekit.parallel.zero import GradientSync
from erniekit.training import optimizer as optimizers
from erniekit.training.optimizer import AdamWSettings, Optimizer
from erniekit.training.router import RouterUpkeep
from tests.parallel.ranks import run_ranks

ROWS, STEPS, EXPERTS = 4, 3, 4  # rows of a step: a rank's gradients are the sum over its own


def make_model() -> ErnieForCausalLM:
    """All in bf16 but what is fp32 in every model: routers and their biases."""
    model = ErnieForCausalLM(ErnieConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, model_type="ernie4_5_moe", moe_num_experts=EXPERTS, moe_k=2, moe_intermediate_size=4,
        moe_layer_start_index=1, moe_layer_end_index=1,
    ), dtype="bfloat16")  # fmt: skip
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters():
        assert p.dtype == (paddle.float32 if ".gate." in name or "correction_bias" in name else paddle.bfloat16), name
        p.set_value(paddle.to_tensor(rng.normal(0, 0.2, p.shape).astype("float32")).astype(p.dtype))
    return model


def descend(
    p: paddle.Tensor, gradient: paddle.Tensor, *, master: paddle.Tensor | None, update: Update, **_others: Any
) -> None:
    """In the place of AdamW, which Paddle has in fp32 only on a CPU; steps are far below what bf16 can tell apart."""
    exact = p if master is None else master
    exact.subtract_(gradient.astype("float32") * (update.learning_rate * update.gradient_scale))
    if master is not None:
        paddle.assign(master.astype(p.dtype), p)


def trained(mesh: Mesh) -> tuple[dict[str, np.ndarray], dict[tuple[str, str, int], np.ndarray]]:
    """The weights after some steps, and this rank's pieces of states, masters and averages: of which parameter, which
    part, from which number on."""
    model = make_model()
    parameters = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    layers = LayerShards(model, mesh) if mesh.layout.stage == 3 else None
    sync = GradientSync(parameters, mesh, flat_bytes=800, layers=layers)
    optimizer = Optimizer(parameters.items(), AdamWSettings(max_grad_norm=0.0), ema_decay=0.5, sync=sync)
    ranks, here = TokenRanks(mesh), range(ROWS)[mesh.axis("data").share(ROWS)]
    upkeep = RouterUpkeep(model, bias_coefficient=0.25, orthogonal_lambda=0.01, ranks=ranks)
    for step in range(STEPS):
        for row in here:
            rng = np.random.default_rng([step, row])
            with optimizer.whole_weights():
                optimizer.expect(last=row == here[-1])
                factors = {n: paddle.to_tensor(rng.integers(-8, 9, p.shape), "float32") for n, p in parameters.items()}
                paddle.add_n([(p.astype("float32") * factors[n]).sum() for n, p in parameters.items()]).backward()
            chosen_MK = paddle.to_tensor(rng.choice(EXPERTS, [5, 2], p=[0.4, 0.3, 0.2, 0.1]))
            upkeep.count([Routing(paddle.zeros([5, EXPERTS]), chosen_MK, paddle.ones([5, 2]))], paddle.ones([5]))
        with mock.patch.object(optimizers, "adamw", descend):
            optimizer.step(2.0**-12, gradient_norm=optimizer.gradient_norm())
        upkeep.after_optimizer()
    states = {(piece.name, piece.part, piece.start): piece.tensor.numpy().ravel() for piece in optimizer.pieces()}
    with optimizer.whole_weights():
        return _numbers(model), {key: numbers for key, numbers in states.items() if numbers.size}


def _numbers(model: ErnieForCausalLM) -> dict[str, np.ndarray]:
    return {name: p.astype("float32").numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", [
    Layout(2), Layout(2, sharding=2, stage=1), Layout(4, sharding=2, stage=2), Layout(2, sharding=2, stage=3),
], ids=str)  # fmt: skip
def test_masters_and_routers_move_as_in_one_process(layout: Layout) -> None:
    (weights, states), ranks = trained(Mesh.single()), run_ranks(trained, layout)
    for name, began in _numbers(make_model()).items():
        assert not np.array_equal(weights[name], began), f"{name} does not move"
        for found, _ in ranks:
            np.testing.assert_array_equal(found[name], weights[name], err_msg=name)
    assert {part for _, part, _ in states} == {"moment1", "moment2", "master", "ema"}
    for (name, part, _), whole in states.items():
        pieces = {key[2]: piece for _, its in ranks for key, piece in its.items() if key[:2] == (name, part)}
        got = np.concatenate([pieces[start] for start in sorted(pieces)])
        np.testing.assert_array_equal(got, whole, err_msg=f"{name}, {part}")
