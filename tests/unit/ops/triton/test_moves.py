"""Moves of routed rows in Triton's interpreter against numpy (extra `parity`)."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from tests.unit.ops.triton.frames import Frame, cut_out

moves = pytest.importorskip("erniekit.ops.triton.moves", reason="needs triton (extra parity)")
pytestmark = pytest.mark.parity
TOKENS, CHOICES, SIZE = 11, 3, 300
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def drawn(*shape: int, dtype: str) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(len(shape)).normal(size=shape).astype("float32")).astype(dtype)


def numbers(x: paddle.Tensor) -> np.ndarray:
    return x.astype("float32").numpy()


@pytest.fixture
def places() -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).permutation(TOKENS * CHOICES).reshape(TOKENS, CHOICES))


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_spread_and_gather(places, dtype, weighted):
    x, rows = cut_out(drawn(TOKENS, SIZE, dtype=dtype), gap=260), cut_out(drawn(33, SIZE, dtype=dtype), gap=264)
    weights = drawn(TOKENS, CHOICES, dtype="float32").abs().astype(dtype) if weighted else None
    y, total = Frame(*rows.shape, dtype=dtype, gap=268), Frame(*x.shape, dtype=dtype, gap=272)
    moves.spread(x, y.inner, places=places, weights=weights)
    moves.gather(rows, total.inner, places=places, weights=weights)
    factor = numbers(weights)[..., None] if weighted else np.ones([TOKENS, CHOICES, 1], "float32")
    half_an_ulp = 2**-8 if dtype == "bfloat16" else 1e-6
    sent, expected = y.numbers()[places.numpy()], np.broadcast_to(numbers(x)[:, None], [TOKENS, CHOICES, SIZE])
    np.testing.assert_allclose(sent, expected * factor, rtol=half_an_ulp if weighted else 0)
    expected = (numbers(rows)[places.numpy()] * factor).sum(1)
    np.testing.assert_allclose(total.numbers(), expected, rtol=half_an_ulp, atol=1e-6)


@DTYPES
def test_gradient_of_weights(places, dtype):
    rows, grad = (drawn(length, SIZE, dtype="bfloat16") for length in (TOKENS * CHOICES, TOKENS))
    rows, grad = cut_out(rows, gap=260), cut_out(grad, gap=264)
    out = Frame(TOKENS, CHOICES, dtype=dtype, gap=0)
    moves.dots(rows, grad, out.inner, places=places)
    expected = (numbers(rows)[places.numpy()] * numbers(grad)[:, None]).sum(-1)
    np.testing.assert_allclose(out.numbers(), expected, rtol=2**-8 if dtype == "bfloat16" else 1e-4, atol=1e-4)


def test_places_and_weights_must_have_no_gaps(places):
    x, y, wide = paddle.zeros([TOKENS, SIZE]), paddle.zeros([TOKENS * CHOICES, SIZE]), paddle.ones([TOKENS, 4])[:, :3]
    for wrong in ({"places": paddle.concat([places, places], 1)[:, :CHOICES]}, {"places": places, "weights": wide}):
        with pytest.raises(AssertionError):
            moves.spread(x, y, **wrong)
        with pytest.raises(AssertionError):
            moves.gather(y, x, **wrong)
