"""The search for convolutional codes: what it reaches, what it keeps to, and what it does with odd weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.ops.arrays.ccq import wint2_windows
from erniekit.precision.ccq import Wint2, Wint25
from tests.unit.ops.test_ccq import slow_wint2, slow_wint25

# Mean square error of N(0, 1) weights: the published figures are 0.110 and 0.102.
REACHED = {"wint2": (Wint2("full"), 0.1025), "wint2, fast": (Wint2("fast"), 0.1045), "wint2.5": (Wint25(), 0.0935)}
ENCODERS = {"wint2": Wint2("fast"), "wint2.5": Wint25()}


def drawn(num_in, num_out, seed=0):
    return np.random.default_rng([seed, num_in, num_out]).normal(size=[num_in, num_out]).astype(np.float32)


def there_and_back(encoder, weight, **how):
    arrays = encoder.encode(weight, name="w", **how)
    return encoder.decode(arrays, num_in=len(weight)), arrays


@pytest.mark.parametrize("name", REACHED)
def test_error_of_normal_weights(name):
    encoder, reached = REACHED[name]
    weight = drawn(2560, 48)
    found, arrays = there_and_back(encoder, weight)
    assert np.square(found - weight).mean() <= reached
    assert sum(array.nbytes for array in arrays.values()) * 8 / weight.size < (2.1 if "wint2," in name + "," else 2.51)


@pytest.mark.parametrize("kind", ENCODERS)
def test_arrays_are_what_was_announced_and_the_slow_decoder_reads_them(kind):
    encoder, weight = ENCODERS[kind], drawn(192, 21)
    found, arrays = there_and_back(encoder, weight)
    said = encoder.fields(*weight.shape)
    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {k: (f.dtype, f.shape) for k, f in said.items()}
    super_scale = arrays["super_scales"].astype(np.float32)
    if kind == "wint2":
        assert arrays["weight_scale"].shape == (2, 21)
        slow = slow_wint2(
            arrays["quant_weight"], arrays["weight_scale"], arrays["code_scale"], arrays["code_zp"], super_scale
        )
    else:
        slow = slow_wint25(arrays["quant_weight"].view(np.uint16), super_scale)
    assert found.tobytes() == slow.tobytes()


def test_codes_of_wint2_are_different_and_decode_the_same_if_operations_are_fused():
    arrays = Wint2("full").encode(drawn(128, 40), name="w")
    every = np.arange(256, dtype=np.uint8)[:, None]
    for scale, zp in zip(arrays["code_scale"], arrays["code_zp"], strict=True):
        windows = wint2_windows(scale, zp, every)[..., 0]
        assert len(np.unique(windows, axis=1).T) == 256
        exact = every[:, 0] * np.float64(scale) + np.float64(zp) + 0.5
        assert (exact.astype(np.float32) == exact).all()
        assert exact.min() >= 0 and exact.max() < 1 << 15  # nothing is lost where codes have 16 bits


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_weighted_search_is_better_under_its_weights(kind):
    encoder, weight = ENCODERS[kind], drawn(512, 30)
    for seed in range(3):
        h = np.random.default_rng(seed).gamma(0.3, size=512)
        weighted, plain = there_and_back(encoder, weight, hessian_diag=h)[0], there_and_back(encoder, weight)[0]
        errors = [(h[:, None] * (found - weight) ** 2).sum() for found in (weighted, plain)]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", ENCODERS)
def test_inputs_that_calibration_never_saw_keep_their_weights(kind):
    h = np.ones(256)
    h[64:128] = h[3] = 0
    weight = drawn(256, 8)
    found, _ = there_and_back(ENCODERS[kind], weight, hessian_diag=h)
    assert np.square(found - weight)[64:128].mean() < 0.13
    found, _ = there_and_back(ENCODERS[kind], weight, hessian_diag=np.zeros(256))
    assert np.square(found - weight).mean() < 0.13


@pytest.mark.parametrize("kind", ENCODERS)
def test_columns_are_searched_by_themselves(kind):
    encoder, weight = ENCODERS[kind], drawn(128, 600)  # in two parts
    whole, _ = there_and_back(encoder, weight)
    part, _ = there_and_back(encoder, weight[:, 500:530].copy())
    assert whole[:, 500:530].tobytes() == part.tobytes()


@pytest.mark.parametrize("kind", ENCODERS)
def test_powers_of_two_change_nothing_but_the_super_scale(kind):
    weight = drawn(128, 16)
    one, _ = there_and_back(ENCODERS[kind], weight)
    for power in (-100, 60):
        other, _ = there_and_back(ENCODERS[kind], np.ldexp(weight, power))
        assert np.ldexp(one, power).tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", ENCODERS)
def test_odd_weights(kind):
    weight = drawn(256, 12)
    weight[:, 0] = 0  # zeros
    weight[:, 1] = 0.37  # one number
    weight[:, 2] *= 1e-38  # subnormal: too small for a super scale
    weight[:, 3] *= 1e37  # nearly too large
    weight[5, 4] = 1e6  # no codeword holds it beside zeros
    weight[64:128, 5] = 0  # a group of zeros
    weight[:, 6] = -0.37
    weight[:, 7] = np.abs(weight[:, 7])
    found, arrays = there_and_back(ENCODERS[kind], weight)
    assert np.isfinite(found).all() and np.isfinite(arrays["super_scales"].astype(np.float32)).all()
    assert not found[:, 0].any() and not found[64:128, 5].any()
    power = np.square(weight.astype(np.float64)).sum(0)
    error = np.square(found.astype(np.float64) - weight).sum(0) / np.maximum(power, 1e-300)
    assert (error <= [0, 0.01, 1, 0.12, 0.95, 0.12, 0.05, *[0.12] * 5]).all(), error


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_has_no_code_is_refused_by_name(kind):
    for bad in (np.nan, np.inf):
        weight = drawn(64, 4)
        weight[7, 2] = bad
        with pytest.raises(CheckpointError, match=r"layers\.3\.w holds NaN or infinity"):
            ENCODERS[kind].encode(weight, name="layers.3.w")
    with pytest.raises(CheckpointError, match=r"layers\.3\.w has 96 inputs.*64 at a time"):
        ENCODERS[kind].encode(drawn(96, 4), name="layers.3.w")
    with pytest.raises(CheckpointError, match=r"the calibration of layers\.3\.w holds NaN"):
        ENCODERS[kind].encode(drawn(64, 4), name="layers.3.w", hessian_diag=np.full(64, np.nan))


def test_super_scales_are_bf16():
    for encoder in ENCODERS.values():
        assert encoder.encode(drawn(64, 4), name="w")["super_scales"].dtype == ml_dtypes.bfloat16
