"""The weighted activation in Triton's interpreter against its formula in fp64 and its quantisation by ops/float8.py
(extra `parity`)."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops import float8
from tests.unit.ops.triton.frames import Frame, cut_out

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
    hidden = cut_out(hidden[:, : 2 * width], gap=136)
    codes, scales = (Frame(ROWS, width, dtype="uint8", gap=140), Frame(ROWS, -(-width // 128), dtype="float32", gap=3))
    swiglu.weighted_swiglu(hidden, weights, codes.inner, scales.inner)
    activated = paddle.to_tensor(expected(hidden, weights, grad[:, :width])[0].astype("float32"))
    held = float8.quantise(activated, float8.Rows(), short=True)
    np.testing.assert_array_equal(scales.numbers(), held.scales.numpy())
    assert (codes.numbers() != held.codes.numpy()).mean() < 2e-3, "fp32 may decide a middle otherwise"
    written = paddle.to_tensor(codes.numbers()), paddle.to_tensor(scales.numbers())
    found = float8.dense(float8.Float8(*written, held.scheme, held.kind, held.counts))
    np.testing.assert_allclose(found.numpy(), activated.numpy(), rtol=2**-4, atol=held.scales.max().item() * 2**-10)


def test_backward_and_its_quantisation():
    hidden, weights, grad = drawn()
    hidden, grad = cut_out(hidden, gap=136), cut_out(grad, gap=140)
    grad_hidden, activated = (
        Frame(ROWS, wide, dtype="bfloat16", gap=gap) for wide, gap in ((2 * WIDTH, 144), (WIDTH, 148))
    )
    codes, scales = (Frame(ROWS, 2 * WIDTH, dtype="uint8", gap=152), Frame(ROWS, 4, dtype="float32", gap=3))
    grad_weights = Frame(ROWS, 1, dtype="float32", gap=0)
    swiglu.weighted_swiglu_backward(
        hidden, weights, grad, grad_hidden=grad_hidden.inner, grad_weights=grad_weights.inner,
        activated=activated.inner, codes=codes.inner, scales=scales.inner,
    )  # fmt: skip
    wanted = expected(hidden, weights, grad)
    np.testing.assert_allclose(activated.numbers(), wanted[0], rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(grad_hidden.numbers(), wanted[1], rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(grad_weights.numbers()[:, 0], wanted[2], rtol=1e-5, atol=1e-4)
    held = float8.quantise(grad_hidden.inner.contiguous(), float8.Rows())
    np.testing.assert_array_equal(scales.numbers(), held.scales.numpy())
    np.testing.assert_array_equal(codes.numbers(), held.codes.numpy())


def test_backward_without_codes_keeps_fp32_and_may_end_in_a_short_block():
    hidden, weights, grad = (x.astype("float32") for x in drawn())
    hidden, grad = hidden[:, :400].contiguous(), cut_out(grad[:, :200], gap=140)
    grad_hidden, activated = Frame(ROWS, 400, dtype="float32", gap=144), Frame(ROWS, 200, dtype="float32", gap=148)
    grad_weights = paddle.zeros([ROWS])
    swiglu.weighted_swiglu_backward(
        hidden, weights, grad, grad_hidden=grad_hidden.inner, grad_weights=grad_weights, activated=activated.inner
    )
    found = activated.numbers(), grad_hidden.numbers(), grad_weights.numpy()
    for got, wanted in zip(found, expected(hidden, weights, grad), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_weights_of_rows_must_have_no_gaps():
    hidden, weights, _ = drawn()
    codes, scales = paddle.zeros([ROWS, WIDTH], "uint8"), paddle.zeros([ROWS, 2])
    with pytest.raises(AssertionError):
        swiglu.weighted_swiglu(hidden, paddle.stack([weights, weights], 1)[:, 0], codes, scales)
