"""The weighted activation in Triton's interpreter against its formula in fp64 and its quantisation by ops/float8.py
(extra `parity`)."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops import float8

swiglu = pytest.importorskip("erniekit.ops.triton.swiglu", reason="needs triton (extra parity)")
pytestmark = pytest.mark.parity
ROWS, WIDTH = 21, 256


def drawn() -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    rng = np.random.default_rng(0)
    hidden, grad = rng.normal(size=[ROWS, 2 * WIDTH]) * 3, rng.normal(size=[ROWS, WIDTH])
    weights = rng.random(ROWS)
    weights[4] = 0.0
    return tuple(paddle.to_tensor(array.astype("float32")).astype("bfloat16") for array in (hidden, weights, grad))


def exact(x: paddle.Tensor) -> np.ndarray:
    return x.astype("float32").numpy().astype(np.float64)


def expected(hidden, weights, grad) -> tuple[np.ndarray, ...]:
    """(activated, its gradients by hidden and by weights) in fp64."""
    (gate, up), weight, g = np.split(exact(hidden), 2, 1), exact(weights)[:, None], exact(grad)
    sigma = 1 / (1 + np.exp(-gate))
    silu = gate * sigma
    of_gate, of_up = g * weight * up * (sigma + silu * (1 - sigma)), g * weight * silu
    return silu * up * weight, np.concatenate([of_gate, of_up], 1), (g * silu * up).sum(1)


@pytest.mark.parametrize("width", [WIDTH, 200], ids=["whole blocks", "a short block"])
def test_forward(width):
    hidden, weights, grad = drawn()
    hidden = hidden[:, : 2 * width].contiguous()
    codes, scales = paddle.zeros([ROWS, width], "uint8"), paddle.zeros([ROWS, -(-width // 128)])
    swiglu.weighted_swiglu(hidden, weights, codes, scales)
    activated = paddle.to_tensor(expected(hidden, weights, grad[:, :width])[0].astype("float32"))
    held = float8.quantise(activated, float8.Rows(), short=True)
    np.testing.assert_array_equal(scales.numpy(), held.scales.numpy())
    assert (codes != held.codes).astype("float32").mean().item() < 2e-3, "fp32 may decide a middle otherwise"
    found = float8.dense(float8.Float8(codes, scales, held.scheme, held.kind, held.counts))
    np.testing.assert_allclose(found.numpy(), activated.numpy(), rtol=2**-4, atol=scales.max().item() * 2**-10)


def test_backward_and_its_quantisation():
    hidden, weights, grad = drawn()
    grad_hidden = paddle.full([ROWS, 2 * WIDTH], float("nan"), "bfloat16")
    grad_weights, activated = paddle.zeros([ROWS]), paddle.full([ROWS, WIDTH], float("nan"), "bfloat16")
    codes, scales = paddle.zeros([ROWS, 2 * WIDTH], "uint8"), paddle.zeros([ROWS, 2 * WIDTH // 128])
    swiglu.weighted_swiglu_backward(
        hidden, weights, grad, grad_hidden=grad_hidden, grad_weights=grad_weights, activated=activated, codes=codes,
        scales=scales,
    )  # fmt: skip
    for found, wanted in zip((activated, grad_hidden), expected(hidden, weights, grad), strict=False):
        np.testing.assert_allclose(exact(found), wanted, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(grad_weights.numpy(), expected(hidden, weights, grad)[2], rtol=1e-5, atol=1e-4)
    held = float8.quantise(grad_hidden, float8.Rows())
    np.testing.assert_array_equal(scales.numpy(), held.scales.numpy())
    np.testing.assert_array_equal(codes.numpy(), held.codes.numpy())


def test_backward_without_codes_keeps_fp32():
    hidden, weights, grad = (x.astype("float32") for x in drawn())
    out = {"grad_hidden": paddle.zeros([ROWS, 2 * WIDTH]), "grad_weights": paddle.zeros([ROWS])}
    activated = paddle.zeros([ROWS, WIDTH])
    swiglu.weighted_swiglu_backward(hidden, weights, grad, **out, activated=activated)
    for found, wanted in zip((activated, *out.values()), expected(hidden, weights, grad), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-4)
