"""Quantisation in Triton's interpreter: the codes and scales of ops/float8.py, bit for bit (extra `parity`)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import paddle
import pytest

from erniekit.ops import float8, hadamard
from erniekit.ops.arrays import float8 as arrays
from tests.unit.ops.triton.frames import Frame, cut_out

quantise = pytest.importorskip("erniekit.ops.triton.quantise", reason="needs triton (extra parity)")
pytestmark = pytest.mark.parity
KINDS = (float8.E4M3, float8.E5M2)


def empty(*shape: int, dtype: str = "uint8") -> paddle.Tensor:
    """What a kernel leaves unwritten stands out: codes of NaN, scales of NaN."""
    return paddle.full(shape, 0x7F if dtype == "uint8" else float("nan"), dtype)


def drawn(*shape: int, seed: int = 0) -> paddle.Tensor:
    """Numbers of very different size, outliers among them, rows and columns of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape) * 3)
    x[rng.random(shape) < 0.01] *= 1e4
    x[..., 1, :], x[..., 2] = 0.0, -0.0
    x[..., 3, :] *= 1e-30
    x[..., 4, :] *= 1e30
    return paddle.to_tensor(x.astype("float32"))


def same(found: paddle.Tensor, expected: paddle.Tensor) -> None:
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_bf16_number_gets_its_code(kind):
    """One block holds the largest of the format, so the scale is 1: every bf16 number in range, with the middles
    between codes, on both sides of zero."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    numbers = numbers[np.abs(numbers) <= kind.largest]
    x = np.zeros([-(-len(numbers) // 127), 128], np.float32)
    x[:, 0] = kind.largest
    np.put(x, [i // 127 * 128 + i % 127 + 1 for i in range(len(numbers))], numbers)
    codes, scales = empty(*x.shape), empty(len(x), 1, dtype="float32")
    quantise.quantise_rows(paddle.to_tensor(x), codes, scales, e5m2=kind is float8.E5M2)
    assert (scales.numpy() == 1).all()
    np.testing.assert_array_equal(codes.numpy(), x.astype(kind.dtype).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows(kind, dtype):
    x = drawn(37, 300).astype(dtype)
    codes, scales = Frame(37, 300, dtype="uint8", gap=136), Frame(37, 3, dtype="float32", gap=3)
    quantise.quantise_rows(cut_out(x, gap=140), codes.inner, scales.inner, e5m2=kind is float8.E5M2)
    expected = float8.quantise(x, float8.Rows(), kind=kind, short=True)
    np.testing.assert_array_equal(codes.numbers(), expected.codes.numpy())
    np.testing.assert_array_equal(scales.numbers(), expected.scales.numpy())


def test_subnormal_numbers():
    """Paddle's own operators take them for zero on a CPU; numpy does not."""
    x = (np.random.default_rng(0).normal(size=[8, 128]) * 1e-38).astype("float32")
    codes, scales = empty(8, 128), empty(8, 1, dtype="float32")
    quantise.quantise_rows(paddle.to_tensor(x), codes, scales)
    expected_codes, expected_scales = arrays.quantised(x, float8.Rows())
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)


def test_rows_are_cut_out_of_wider_ones_and_scales_may_lie_by_columns():
    wide = drawn(40, 512)
    x, codes, scales = wide[:, 128:384], empty(40, 256), empty(2, 40, dtype="float32")
    assert x.strides == [512, 1]
    quantise.quantise_rows(x, codes, scales.T, e5m2=False)
    expected = float8.quantise(x, float8.Rows())
    same(codes, expected.codes)
    same(scales.T, expected.scales)


def test_blocks_and_the_same_codes_turned():
    w = drawn(2, 200, 260)
    codes, turned = Frame(2, 200, 260, dtype="uint8", gap=136), Frame(2, 260, 200, dtype="uint8", gap=140)
    scales = Frame(2, 2, 3, dtype="float32", gap=3)
    quantise.quantise_blocks(cut_out(w, gap=144), codes.inner, scales.inner, turned=turned.inner)
    expected = float8.quantise(w, float8.Blocks(), short=True)
    np.testing.assert_array_equal(codes.numbers(), expected.codes.numpy())
    np.testing.assert_array_equal(turned.numbers(), expected.codes.transpose([0, 2, 1]).numpy())
    np.testing.assert_array_equal(scales.numbers(), expected.scales.numpy())


def test_permuted_rows_are_those_of_permuting_first():
    x, places = drawn(9, 256), paddle.to_tensor(np.random.default_rng(0).permutation(27).reshape(9, 3))
    codes, scales = empty(27, 256), empty(27, 2, dtype="float32")
    quantise.quantise_rows(x, codes, scales, places=places)
    sorted_rows = paddle.to_tensor(x.numpy()[np.argsort(places.numpy().reshape(-1)) // 3])
    expected = float8.quantise(sorted_rows, float8.Rows())
    same(codes, expected.codes)
    same(scales, expected.scales)


@pytest.mark.parametrize("from_codes", [False, True], ids=["numbers", "codes"])
def test_columns_begin_anew_with_every_expert(from_codes):
    counts, size = [5, 0, 130, 1, 128], 192
    rows, x = sum(counts), drawn(sum(counts), 192)
    held = float8.quantise(x, float8.Rows(), short=True)
    numbers = float8.dense(held) if from_codes else x
    expected = float8.quantise(numbers, float8.Columns(), counts=counts, short=True)
    codes = empty(size, quantise.padded_rows(rows, len(counts)))
    scales = Frame(codes.shape[1] // 128, size, dtype="float32", gap=68)
    ends = paddle.to_tensor(np.cumsum(counts).astype("int32"))
    of_rows = cut_out(held.scales, gap=3) if from_codes else None
    given = cut_out(held.codes if from_codes else x, gap=140)
    quantise.quantise_columns(given, codes, scales.inner, ends=ends, x_scales=of_rows)
    blocks = [-(-count // 128) for count in counts]
    np.testing.assert_array_equal(scales.numbers()[: sum(blocks)], expected.scales.numpy())
    start = at = 0
    for count, of_expert in zip(counts, blocks, strict=True):
        mine = codes.numpy()[:, at : at + of_expert * 128]
        np.testing.assert_array_equal(mine[:, :count].T, expected.codes[start : start + count].numpy())
        assert not mine[:, count:].any()
        start, at = start + count, at + of_expert * 128
    assert (codes[:, at:] == 0x7F).all(), "behind the last expert nothing is written"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rotated_rows_under_one_scale(kind):
    """A scale that is no power of two, and too small for the outliers."""
    x = paddle.to_tensor(np.random.default_rng(1).integers(-99, 99, [35, 160]).astype("float32"))  # sums are exact
    rotated, amax = hadamard.rotate(x), paddle.zeros([1], "int32")
    quantise.rotated_amax(x, amax)
    assert amax.view("float32").item() == rotated.abs().max().item()
    scale = rotated.abs().max().reshape([1]) / (kind.largest * 1.5)
    codes = Frame(35, 160, dtype="uint8", gap=136)
    quantise.rotate_quantise(cut_out(x, gap=140), codes.inner, scale=scale, e5m2=kind is float8.E5M2)
    expected = float8.quantise(rotated, float8.Tensor(), kind=kind, scale=scale).codes
    np.testing.assert_array_equal(codes.numbers(), expected.numpy())


def test_rotation_of_any_numbers_is_close():
    x, amax = drawn(8, 64, seed=3)[5:], paddle.zeros([1], "int32")
    quantise.rotated_amax(x, amax)
    np.testing.assert_allclose(amax.view("float32").item(), hadamard.rotate(x).abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale(wrong):
    x = paddle.ones([2, 256])
    x[0, 200] = wrong
    codes, scales = empty(2, 256), paddle.zeros([2, 2])
    quantise.quantise_rows(x, codes, scales)
    assert np.isnan(scales.numpy()).tolist() == [[False, True], [False, False]]


def test_nothing_to_quantise():
    quantise.quantise_rows(paddle.zeros([0, 128]), empty(0, 128), paddle.zeros([0, 1]))
