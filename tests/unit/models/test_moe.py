"""The slots of the routed experts, and rows that bring their weights along."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from erniekit.models.moe import MoE
from erniekit.ops.grouped import grouped_linear, grouped_mlp
from tests.unit.models.test_decoder import build

TOKENS, SIZE = 9, 32


def block(**slots: Any) -> MoE:
    """One of four experts, two of which each token takes; always the same weights."""
    made = build().model.layers[1].mlp
    assert isinstance(made, MoE)
    for name, value in slots.items():
        setattr(made.experts, name, value)
    return made


def passed(block: MoE) -> dict[str, np.ndarray]:
    """The output for some tokens and all gradients."""
    x = paddle.to_tensor(np.random.default_rng(3).normal(size=(1, TOKENS, SIZE)).astype("float32"))
    x.stop_gradient = False
    y = block(x)[0]
    paddle.square(y).sum().backward()
    named = {name: p.grad.numpy() for name, p in block.named_parameters() if p.grad is not None}
    return named | {"x": x.grad.numpy(), "y": y.numpy()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    assert {"gate.weight", "experts.gate_up_proj", "experts.down_proj"} <= expected.keys()
    for name, want in expected.items():
        assert np.abs(want).max() > 1e-3, name
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=2e-6 * np.abs(want).max(), err_msg=name)


class Adds(paddle.nn.Layer):
    """An adapter that adds half of the rows' first number."""

    def forward(self, rows: paddle.Tensor, made: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        assert sum(counts) == rows.shape[0]
        return made + 0.5 * rows[:, :1]


@pytest.mark.parametrize("adapters", [{}, {"down_adapter": Adds()}, {"gate_up_adapter": Adds()}], ids=list)
def test_weights_before_down_are_weights_of_the_sum(adapters: dict[str, Adds]) -> None:
    assert_same(passed(block(weighs_rows=True, **adapters)), passed(block(**adapters)))


def test_products_go_through_their_slots() -> None:
    shapes = []

    def product(rows: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        shapes.append(tuple(weight.shape))
        return grouped_linear(rows, weight, counts=counts)

    assert_same(passed(block(gate_up_product=product, down_product=product)), passed(block()))
    assert shapes == [(4, 32, 32), (4, 16, 32)]


def test_the_whole_mlp_goes_through_its_slot_unless_there_are_adapters() -> None:
    calls = []

    def mlp(
        x: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor, counts: list[int], weights: Any
    ) -> paddle.Tensor:
        calls.append(counts)
        y = grouped_mlp(x, gate_up, down, counts=counts)
        return y if weights is None else y * weights.unsqueeze(-1)

    assert_same(passed(block(mlp=mlp)), passed(block()))
    assert_same(passed(block(mlp=mlp, weighs_rows=True)), passed(block()))
    assert len(calls) == 2 and sum(calls[0]) == 2 * TOKENS
    passed(block(mlp=mlp, down_adapter=Adds()))
    assert len(calls) == 2
