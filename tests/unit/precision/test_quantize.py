"""Codes and scales beside a slow reference written from the definitions, and what no weight may do to them."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.ops.arrays.packed import LEVELS, NF4, NORMAL_FLOAT
from erniekit.precision.quantize import code_rows, dense, pack

KINDS = ("int8", "int4", "nf4")
LARGEST = {"int8": 127, "int4": 7, "nf4": 1}
# inputs, outputs, group size; odd ones leave half a byte
SHAPES = [(1, 1, None), (7, 5, None), (8, 3, 4), (9, 4, 3), (130, 33, 65), (64, 40, 64), (256, 300, 128)]


def drawn(num_in: int, num_out: int) -> np.ndarray:
    return np.random.default_rng([num_in, num_out]).normal(0.0, 0.02, [num_in, num_out]).astype("float32")


def reference(weight: np.ndarray, kind: str, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(levels, scales), number by number."""
    num_in, num_out = weight.shape
    group = group_size or num_in
    levels, scales = np.empty_like(weight), np.empty([num_in // group, num_out], np.float32)
    for o in range(num_out):
        for g in range(num_in // group):
            rows = slice(g * group, (g + 1) * group)
            scale = np.float32(max(abs(weight[rows, o]))) / np.float32(LARGEST[kind])
            scales[g, o] = scale
            for i in range(rows.start, rows.stop):
                if kind == "nf4":
                    nearest = np.abs(LEVELS[NF4].astype(np.float64) - float(weight[i, o] / scale)).argmin()
                    levels[i, o] = LEVELS[NF4][nearest]
                else:
                    levels[i, o] = np.rint(weight[i, o] / scale)
    return levels, scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_the_reference_bit_for_bit(kind, shape):
    num_in, num_out, group_size = shape
    weight = drawn(num_in, num_out)
    levels, scales = reference(weight, kind, group_size)
    codes, found = pack(weight, kind, group_size, name="w")
    assert found.tobytes() == scales.tobytes()
    assert codes.shape == (code_rows(kind, num_in), num_out)
    expected = (levels + 0.0) * np.repeat(scales, num_in // len(scales), axis=0)  # codes know one zero, not two
    assert dense(codes, scales, kind, num_in).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_comes_back(kind):
    """A weight that is made of all levels is packed without any error, in both halves of a byte."""
    levels = np.arange(-127, 128) if kind == "int8" else NORMAL_FLOAT if kind == "nf4" else np.arange(-7, 8)
    column = np.concatenate([levels, levels[::-1], levels[:1]]).astype("float32")
    weight = np.stack([column, np.roll(column, 1)], axis=1) * np.float32(0.5)
    codes, scales = pack(weight, kind, None, name="w")
    np.testing.assert_array_equal(dense(codes, scales, kind, len(weight)), weight)
    assert len({*codes.reshape(-1).tolist()}) >= (255 if kind == "int8" else 15)


def test_two_codes_share_a_byte_the_even_row_in_the_low_half():
    codes, scales = pack(np.array([[7.0], [-7.0], [1.0]], np.float32), "int4", None, name="w")
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[15 + 16 * 1], [9]]


def test_nf4_is_the_published_table():
    """QLoRA (arXiv 2305.14314): quantiles of the normal distribution, 8 negative, 0, and 7 positive, of -1 to 1."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert NORMAL_FLOAT.tolist() == published
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    np.testing.assert_allclose(np.array(sorted([*below, 0.0, *above])) / above[0], NORMAL_FLOAT, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [None, 32])
def test_no_number_is_further_off_than_half_a_step(kind, group_size):
    weight = drawn(128, 64)
    weight[3] *= 100.0  # an outlier in every output
    weight[:, 0] = np.linspace(-1.0, 1.0, 128)
    weight[:, 5] *= 1e-30
    codes, scales = pack(weight, kind, group_size, name="w")
    half = np.diff(NORMAL_FLOAT).max() / 2 if kind == "nf4" else 0.5
    bound = half * np.repeat(scales, len(weight) // len(scales), axis=0)
    error = np.abs(dense(codes, scales, kind, len(weight)) - weight)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error / bound).max() > 0.9


def test_an_outlier_costs_its_own_group_only():
    weight = drawn(128, 1)
    weight[0] = 10.0
    whole = np.abs(dense(*pack(weight, "int4", None, name="w"), "int4", 128) - weight)
    groups = np.abs(dense(*pack(weight, "int4", 32, name="w"), "int4", 128) - weight)
    assert np.array_equal(whole[:32], groups[:32])
    assert groups[32:].max() < 0.2 * whole[32:].max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40])
def test_zeros_and_the_smallest_numbers_divide_nothing_by_zero(kind, value):
    weight = drawn(8, 3)
    weight[:, 1] = value
    with np.errstate(all="raise", under="ignore"):
        codes, scales = pack(weight, kind, 4, name="w")
    found = dense(codes, scales, kind, 8)
    assert (scales > 0).all()
    assert np.isfinite(found).all()
    assert np.abs(found[:, 1] - weight[:, 1]).max() <= scales[0, 1] / 2
    if not value:
        assert not found[:, 1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_name(kind, value):
    weight = drawn(6, 4)
    weight[5, 2] = value
    with pytest.raises(CheckpointError, match=r"some\.weight holds NaN or infinity"):
        pack(weight, kind, 3, name="some.weight")


def test_large_weights_are_packed_in_blocks_of_columns():
    weight = drawn(2048, 1111)  # three blocks
    codes, scales = pack(weight, "int4", None, name="w")
    for part in (slice(0, 400), slice(400, 1111)):
        np.testing.assert_array_equal(codes[:, part], pack(weight[:, part], "int4", None, name="w")[0])
    assert scales.shape == (1, 1111)
