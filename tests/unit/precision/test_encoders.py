"""Formats of a stored weight beside the definitions, and what may happen to a weight."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.precision.encoders import BLOCK, SCALE, W4A8, WEIGHT, Encoder, Float8, Float8Blocks, Integers

ENCODERS = {
    "int8": Integers("int8"), "int8 by groups": Integers("int8", 32), "int4": Integers("int4"),
    "int4 by groups": Integers("int4", 64), "w4a8": W4A8(), "fp8": Float8(), "fp8 by blocks": Float8Blocks(),
}  # fmt: skip


def drawn(num_in: int = 256, num_out: int = 200) -> np.ndarray:
    """A weight with outliers and a column of zeros."""
    random = np.random.default_rng([num_in, num_out])
    weight = random.normal(0, 0.02, [num_in, num_out]).astype(np.float32)
    weight[random.integers(0, num_in, 9), random.integers(0, num_out, 9)] *= 50
    weight[:, 5] = 0
    return weight


@pytest.fixture(params=ENCODERS.values(), ids=ENCODERS.keys())
def encoder(request) -> Encoder:
    return request.param


def test_arrays_are_what_fields_say_and_codes_of_decoded_weights_are_the_same(encoder):
    weight = drawn()
    arrays = encoder.encode(weight, name="w")
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == encoder.fields(*weight.shape)
    decoded = encoder.decode(arrays, num_in=len(weight))
    assert decoded.dtype == np.float32 and decoded.shape == weight.shape
    assert not decoded[:, 5].any()
    again = encoder.encode(decoded, name="w")
    assert again[WEIGHT].tobytes() == arrays[WEIGHT].tobytes()
    four_bits = isinstance(encoder, Integers) and encoder.kind == "int4"
    assert np.linalg.norm(decoded - weight) < (0.5 if four_bits else 0.05) * np.linalg.norm(weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(encoder, bad):
    weight = drawn()
    weight[200, 7] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.x holds NaN or infinity"):
        encoder.encode(weight, name="layers.3.x")


def test_w4a8_is_int4_whose_scale_is_the_largest_number():
    weight = drawn()
    mine, plain = W4A8().encode(weight, name="w"), Integers("int4").encode(weight, name="w")
    assert mine[WEIGHT].tobytes() == plain[WEIGHT].tobytes()
    np.testing.assert_array_equal(mine[SCALE], np.abs(weight).max(0))
    expected = Integers("int4").decode(plain, num_in=len(weight))
    assert W4A8().decode(mine, num_in=len(weight)).tobytes() == expected.tobytes()


def test_fp8_is_the_cast_of_ml_dtypes():
    weight = drawn(130, 70)
    arrays = Float8().encode(weight, name="w")
    scale = np.abs(weight).max() / np.float32(448)
    cast = np.clip(weight / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert arrays[WEIGHT].tobytes() == cast.tobytes() and arrays[SCALE].tolist() == [scale]
    expected = cast.astype(np.float32) * scale
    assert Float8().decode(arrays, num_in=130).tobytes() == expected.tobytes()


def test_fp8_by_blocks_is_a_block_at_a_time():
    weight = drawn(2 * BLOCK, 300)  # the last blocks are short
    weight[:BLOCK, :BLOCK] = 0
    arrays = Float8Blocks().encode(weight, name="w")
    decoded = Float8Blocks().decode(arrays, num_in=2 * BLOCK)
    for i in range(2):
        for j in range(3):
            part = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            largest, scale = np.abs(weight[part]).max(), arrays[SCALE][i, j]
            assert np.frexp(scale)[0] == 0.5
            assert largest / scale <= 448 < 2 * largest / scale if largest else scale == 1
            cast = np.clip(weight[part] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(decoded[part], cast.astype(np.float32) * scale)
