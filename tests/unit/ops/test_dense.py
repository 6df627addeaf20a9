"""Linear, RMSNorm and the gated activation beside their plain twins."""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from erniekit.ops.mlp import linear, swiglu, swiglu_plain
from erniekit.ops.norm import rms_norm, rms_norm_plain
from tests.unit.ops.conftest import drawn

SHAPES = [(1, 1), (3, 7), (2, 5, 48), (130, 64), (2, 1, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm(twins, shape, eps):
    arrays = {"x": drawn(*shape), "weight_D": drawn(shape[-1], seed=1)}
    twins(partial(rms_norm, eps=eps), partial(rms_norm_plain, eps=eps), arrays)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(twins, shape):
    twins(swiglu, swiglu_plain, {"gate": 4.0 * drawn(*shape), "up": drawn(*shape, seed=1)})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(twins, shape, bias):
    arrays = {"x": drawn(*shape), "weight": drawn(shape[-1], 19, seed=1)} | ({"bias": drawn(19, seed=2)} if bias else {})
    twins(
        lambda x, weight, bias=None: linear(x, weight, bias), lambda x, weight, bias=None: F.linear(x, weight, bias), arrays
    )


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("weight", "bias"), ("x", "bias"), ("x", "weight", "bias")])
def test_frozen_inputs_get_no_gradient(twins, frozen):
    arrays = {"x": drawn(6, 16), "weight": drawn(16, 8, seed=1), "bias": drawn(8, seed=2)}
    twins(linear_of, lambda x, weight, bias: F.linear(x, weight, bias), arrays, frozen=frozen)
    pair = {"x": arrays["x"], "weight": drawn(16, seed=3)}
    few = tuple(name for name in frozen if name in pair)
    twins(
        lambda x, weight: rms_norm(x, weight, eps=1e-5), lambda x, weight: rms_norm_plain(x, weight, eps=1e-5), pair,
        frozen=few,
    )  # fmt: skip
    same = {"x": arrays["x"], "weight": drawn(6, 16, seed=4)}
    twins(lambda x, weight: swiglu(x, weight), lambda x, weight: swiglu_plain(x, weight), same, frozen=few)


def linear_of(x, weight, bias):
    return linear(x, weight, bias)


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
