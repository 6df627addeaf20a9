"""Moves of routed rows in Triton's interpreter against numpy (extra `parity`)."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

moves = pytest.importorskip("erniekit.ops.triton.moves", reason="needs triton (extra parity)")
pytestmark = pytest.mark.parity
TOKENS, CHOICES, SIZE = 11, 3, 300


def drawn(*shape: int, dtype: str) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(len(shape)).normal(size=shape).astype("float32")).astype(dtype)


def numbers(x: paddle.Tensor) -> np.ndarray:
    return x.astype("float32").numpy()


@pytest.fixture
def places() -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).permutation(TOKENS * CHOICES).reshape(TOKENS, CHOICES))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_spread_and_gather(places, dtype, weighted):
    x, rows = drawn(TOKENS, SIZE, dtype=dtype), drawn(TOKENS * CHOICES, SIZE, dtype=dtype)
    weights = drawn(TOKENS, CHOICES, dtype="float32").abs().astype(dtype) if weighted else None
    y, total = (paddle.full([len(like), SIZE], float("nan"), dtype) for like in (rows, x))
    moves.spread(x, y, places=places, weights=weights)
    moves.gather(rows, total, places=places, weights=weights)
    factor = numbers(weights)[..., None] if weighted else np.ones([TOKENS, CHOICES, 1], "float32")
    half_an_ulp = 2**-8 if dtype == "bfloat16" else 1e-6
    expected = numbers(x)[:, None] * factor
    np.testing.assert_allclose(numbers(y)[places.numpy()], expected, rtol=half_an_ulp)
    if not weighted:
        np.testing.assert_array_equal(numbers(y)[places.numpy()], np.broadcast_to(expected, [TOKENS, CHOICES, SIZE]))
    expected = (numbers(rows)[places.numpy()] * factor).sum(1)
    np.testing.assert_allclose(numbers(total), expected, rtol=half_an_ulp, atol=1e-6)


def test_gradient_of_weights(places):
    rows, grad = drawn(TOKENS * CHOICES, SIZE, dtype="bfloat16"), drawn(TOKENS, SIZE, dtype="bfloat16")
    out = paddle.zeros([TOKENS, CHOICES])
    moves.dots(rows, grad, out, places=places)
    expected = (numbers(rows)[places.numpy()] * numbers(grad)[:, None]).sum(-1)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)
