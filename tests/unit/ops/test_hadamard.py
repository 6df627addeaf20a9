"""Hadamard rotations beside their plain twins and beside the matrix itself."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.hadamard import SIZE, rotate, rotate_inputs, rotate_inputs_plain, rotate_plain, sylvester
from tests.unit.ops.twins import assert_twins, drawn


def whole(size: int) -> np.ndarray:
    """The block-diagonal matrix."""
    return np.kron(np.eye(size // SIZE), sylvester())


def test_the_matrix():
    h = sylvester()
    assert set(np.unique(h)) == {-1, 1}
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_array_equal(h @ h.T, SIZE * np.eye(SIZE))
    np.testing.assert_array_equal(h[:2, :4], [[1, 1, 1, 1], [1, -1, 1, -1]])
    assert h[3, 3] == 1 and h[7, 7] == -1  # Sylvester's order: the sign counts common bits


@pytest.mark.parametrize("shape", [(32,), (5, 96), (3, 2, 64), (0, 64)], ids=str)
def test_rows(shape):
    arrays = {"x_D": drawn(*shape)}
    if arrays["x_D"].size:
        assert_twins(rotate, rotate_plain, arrays)
    found = rotate(paddle.to_tensor(arrays["x_D"])).numpy()
    np.testing.assert_allclose(found, arrays["x_D"].astype("float64") @ whole(shape[-1]), atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 1), (64, 33), (3, 96, 20)], ids=str)
def test_inputs_of_weights(shape):
    arrays = {"weight_DF": drawn(*shape)}
    assert_twins(rotate_inputs, rotate_inputs_plain, arrays)
    found = rotate_inputs(paddle.to_tensor(arrays["weight_DF"])).numpy()
    np.testing.assert_allclose(found, whole(shape[-2]) @ arrays["weight_DF"].astype("float64"), atol=1e-5)


def test_a_product_is_32_times_what_it_was():
    x, w = drawn(7, 64).astype("float64"), drawn(64, 5).astype("float64")
    turned = rotate(paddle.to_tensor(x)) @ rotate_inputs(paddle.to_tensor(w))
    np.testing.assert_allclose(turned.numpy() / SIZE, x @ w, rtol=1e-12, atol=1e-12)


def test_whole_numbers_stay_exact():
    x = paddle.to_tensor(np.arange(-480, 480, dtype="float32").reshape(5, 192))
    np.testing.assert_array_equal(rotate(rotate(x)).numpy(), 32 * x.numpy())
    w = paddle.to_tensor(np.arange(-480, 480, dtype="float32").reshape(192, 5))
    np.testing.assert_array_equal(rotate_inputs(rotate_inputs(w)).numpy(), 32 * w.numpy())


def test_an_outlier_channel_is_spread():
    """A channel 200 times as large as the others: absmax / rms falls from about 25 to about 4.5."""
    x = np.random.default_rng(0).normal(size=(512, 1024)).astype("float32")
    x[:, 100] *= 200

    def peak(a):
        return (np.abs(a).max(1) / np.sqrt((a * a).mean(1))).mean()

    before, after = peak(x), peak(rotate(paddle.to_tensor(x)).numpy())
    assert before > 20 and after < 6, (before, after)


@pytest.mark.parametrize("shape", [(4, 48), (48, 4)])
def test_sizes_that_are_no_blocks(shape):
    with pytest.raises(AssertionError, match="48"):
        (rotate if shape[1] == 48 else rotate_inputs)(paddle.zeros(shape))
