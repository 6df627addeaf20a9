"""Linear, RMSNorm and the gated activation beside their plain twins."""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from erniekit.ops.mlp import (
    linear,
    swiglu,
    swiglu_plain,
    weighted_gated,
    weighted_gated_backward,
    weighted_gated_backward_plain,
    weighted_gated_plain,
)
from erniekit.ops.norm import rms_norm, rms_norm_plain
from tests.unit.ops.twins import assert_close, assert_twins, drawn

SHAPES = [(1, 1), (3, 7), (2, 5, 48), (130, 64), (2, 1, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm(shape, eps):
    arrays = {"x": drawn(*shape), "weight_D": drawn(shape[-1], seed=1)}
    assert_twins(partial(rms_norm, eps=eps), partial(rms_norm_plain, eps=eps), arrays)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    assert_twins(swiglu, swiglu_plain, {"gate": 4.0 * drawn(*shape), "up": drawn(*shape, seed=1)})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_weighted_gated(rows, weighted):
    hidden = paddle.to_tensor(4.0 * drawn(rows, 66), stop_gradient=False)
    weights = paddle.to_tensor(drawn(rows, seed=1), stop_gradient=False) if weighted else None
    grad = paddle.to_tensor(drawn(rows, 33, seed=2))
    expected = weighted_gated_plain(hidden, weights)
    parts = ("act", "hidden", "weights")

    def named(made):
        return {part: None if x is None else x.numpy() for part, x in zip(parts, made, strict=True)}

    if rows:
        (expected * grad).sum().backward()
        by_paddle = named([expected, hidden.grad, weights.grad if weighted else None])
        assert_close(named(weighted_gated_backward_plain(hidden, weights, grad)), by_paddle)
        assert_close(named(weighted_gated_backward(hidden, weights, grad)), by_paddle)
    assert_close({"out": weighted_gated(hidden, weights).numpy()}, {"out": expected.numpy()})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape, bias):
    arrays = {"x": drawn(*shape), "weight": drawn(shape[-1], 19, seed=1)}
    if bias:
        arrays["bias"] = drawn(19, seed=2)
    assert_twins(partial(of_keywords, linear), partial(of_keywords, F.linear), arrays)


def of_keywords(op, x, weight, bias=None):
    return op(x, weight, bias)


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("weight", "bias"), ("x", "bias"), ("x", "weight", "bias")])
def test_frozen_inputs_of_linear_get_no_gradient(frozen):
    arrays = {"x": drawn(6, 16), "weight": drawn(16, 8, seed=1), "bias": drawn(8, seed=2)}
    assert_twins(partial(of_keywords, linear), partial(of_keywords, F.linear), arrays, frozen=frozen)


@pytest.mark.parametrize("frozen", [("x",), ("weight_D",), ("x", "weight_D")])
def test_frozen_inputs_of_rms_norm_get_no_gradient(frozen):
    arrays = {"x": drawn(6, 16), "weight_D": drawn(16, seed=1)}
    assert_twins(partial(rms_norm, eps=1e-5), partial(rms_norm_plain, eps=1e-5), arrays, frozen=frozen)


@pytest.mark.parametrize("frozen", [("gate",), ("up",), ("gate", "up")])
def test_frozen_inputs_of_swiglu_get_no_gradient(frozen):
    assert_twins(swiglu, swiglu_plain, {"gate": drawn(6, 16), "up": drawn(6, 16, seed=1)}, frozen=frozen)


def test_no_rows():
    x, weight = paddle.zeros([0, 5]), paddle.to_tensor(drawn(5, 3))
    x.stop_gradient = weight.stop_gradient = False
    out = linear(rms_norm(x, paddle.ones([5]), eps=1e-5), weight, None)
    (swiglu(out, out).sum() + 0.0 * weight.sum()).backward()
    assert out.shape == [0, 3]
    assert not weight.grad.numpy().any()


def test_extreme_gates():
    gate = paddle.to_tensor(np.array([-1e30, -200.0, -88.5, -20.0, 0.0, 20.0, 88.5, 200.0, 1e30], "float32"))
    found = swiglu(gate, paddle.ones_like(gate)).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, swiglu_plain(gate, paddle.ones_like(gate)).numpy(), rtol=1e-5, atol=1e-30)


def test_nan_stays_visible():
    bad = paddle.to_tensor(np.array([[1.0, np.nan, 2.0]], "float32"))
    assert np.isnan(swiglu(bad, paddle.ones_like(bad)).numpy()[0, 1])
    assert np.isnan(rms_norm(bad, paddle.ones([3]), eps=1e-5).numpy()).all()
    assert np.isnan(linear(bad, paddle.ones([3, 2]), None).numpy()).all()
