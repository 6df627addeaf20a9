"""FP8 numbers beside ml_dtypes and beside the definition of both formats, written out here."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import paddle
import pytest

from erniekit.base.errors import NotFinite
from erniekit.ops import float8
from erniekit.ops.arrays import float8 as arrays
from erniekit.ops.float8 import E4M3, E5M2, Blocks, Columns, Rows, Tensor, dense, quantise
from tests.unit.ops.twins import drawn

KINDS = [E4M3, E5M2]
SCHEMES = [Rows(), Columns(), Blocks(), Tensor(), Rows(40), Columns(7), Blocks(3, 5), Rows(1000), Blocks(600, 1000)]
COUNTS = [[130], [0, 100, 3, 0, 27], [0, 0, 130], [64, 65, 1]]


def meaning(code: int, kind: float8.Kind) -> float:
    """What a code stands for, from its sign, exponent and mantissa."""
    bits, bias = (3, 7) if kind is E4M3 else (2, 15)
    exponent, mantissa = code % 128 >> bits, code % (1 << bits)
    if kind is E4M3 and code % 128 == 127:
        return np.nan
    if kind is E5M2 and exponent == 31:
        return np.nan if mantissa else np.inf * (1 - code // 128 * 2)
    size = (mantissa / (1 << bits) + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
    return -size if code >= 128 else size


def table(kind):
    """The finite magnitudes in the order of their codes."""
    values = np.array([meaning(code, kind) for code in range(128)])
    return values[np.isfinite(values)]


def nearest(x: np.ndarray, kind: float8.Kind) -> np.ndarray:
    """The code of every number by search: the nearest value, of two the one with an even code."""
    values = table(kind)
    size = np.abs(x.astype("float64"))
    above = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    low, high = size - values[above - 1], values[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return (code + np.signbit(x) * 128).astype("uint8")


def cast(x: np.ndarray, kind: float8.Kind, *, scale: float = 1.0) -> np.ndarray:
    """The codes of a flat array, with this scale."""
    made = quantise(paddle.to_tensor(x[None]), Tensor(), kind=kind, scale=paddle.to_tensor([scale]))
    plain = float8.quantise_plain(
        paddle.to_tensor(x[None]), Tensor(), kind=kind, counts=[1], scale=paddle.to_tensor([scale]), name=""
    )
    assert made.codes.numpy().tobytes() == plain.codes.numpy().tobytes()
    return made.codes.numpy()[0]


def wild(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers of all sizes, with zeros, subnormal numbers and outliers."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.normal(size=shape) * np.exp(6 * rng.normal(size=shape))
    x[rng.random(shape) < 0.02] *= 1e6
    x[rng.random(shape) < 0.05] = 0.0
    x[rng.random(shape) < 0.05] *= 1e-40
    return x.astype("float32")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_code_stands_for_what_the_format_says(kind):
    codes = np.arange(256, dtype="uint8")
    expected = np.array([meaning(code, kind) for code in range(256)], "float32")
    held = float8.Float8(paddle.to_tensor(codes[None]), paddle.ones([1, 1]), Tensor(), kind, [1])
    for found in (dense(held).numpy()[0], float8.dense_plain(held).numpy()[0], arrays.decode(codes, kind)):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected) | (np.isnan(found) & np.signbit(found)))
    np.testing.assert_array_equal(codes.view(kind.dtype).astype("float32"), expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_number_and_every_tie_is_cast_as_the_format_says(kind):
    values = table(kind).astype("float32")
    middles = (values[1:] + values[:-1]) / 2  # exact in fp32
    around = [np.nextafter(middles, np.float32(way)) for way in (-np.inf, np.inf)]
    x = np.concatenate([values, middles, *around])
    x = np.concatenate([x, -x])
    codes = cast(x, kind)
    np.testing.assert_array_equal(codes, nearest(x, kind))
    np.testing.assert_array_equal(codes, x.astype(kind.dtype).view("uint8"))
    np.testing.assert_array_equal(codes[: len(values)], np.arange(len(values)))
    np.testing.assert_array_equal(codes[len(values) : len(values) + len(middles)] % 2, 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_numbers(kind):
    x = np.concatenate([wild(20000), drawn(20000), np.float32(1e-44) * np.arange(50, dtype="float32")])
    codes = cast(x, kind)
    np.testing.assert_array_equal(codes, nearest(x, kind))
    clamped = np.clip(x, -kind.largest, kind.largest)
    np.testing.assert_array_equal(codes, clamped.astype(kind.dtype).view("uint8"))
    odd = np.float32(0.0371)
    np.testing.assert_array_equal(cast(x, kind, scale=0.0371), nearest(x / odd, kind))


def test_beyond_the_format_numbers_are_clamped():
    """Where the cast of Paddle gives NaN and infinity."""
    x = np.array([447.9, 448, 449, 460, 464, 464.1, 472, 479.9, 480, 1e4, 3e38], "float32")
    np.testing.assert_array_equal(cast(np.concatenate([x, -x]), E4M3) % 128, 0x7E)
    x = np.array([57344, 6e4, 61440, 62000, 65535, 65536, 1e9, 3e38], "float32")
    np.testing.assert_array_equal(cast(np.concatenate([x, -x]), E5M2) % 128, 0x7B)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", [Rows(), Columns(), Blocks(), Tensor()], ids=str)
def test_nan_and_infinity_are_refused_by_name(scheme, bad):
    for at in (0, 77, 255):
        x = drawn(4, 256)
        x[3, at] = bad
        with pytest.raises(NotFinite, match=r"layers\.3\.x holds NaN or infinity"):
            quantise(paddle.to_tensor(x), scheme, short=True, name="layers.3.x")
    with pytest.raises(NotFinite, match="w holds NaN"):
        float8.quantise_plain(paddle.to_tensor(x), scheme, kind=E4M3, counts=[4], scale=None, name="w")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_scales_are_the_smallest_powers_of_two(kind):
    edges = kind.largest * 2.0 ** np.arange(-120, 100)
    amax = np.concatenate([edges, np.nextafter(edges.astype("float32"), np.float32(np.inf)), wild(500)])
    amax = np.abs(amax[amax != 0]).astype("float32")
    x = np.zeros([len(amax), 128], "float32")
    x[:, 5], x[:, 9] = -amax, amax / 2
    scales = quantise(paddle.to_tensor(x), Rows(), kind=kind).scales.numpy()[:, 0]
    np.testing.assert_array_equal(np.frexp(scales)[0], 0.5)
    assert (amax / scales.astype("float64") <= kind.largest).all()
    least = np.finfo("float32").tiny
    assert ((amax / scales.astype("float64") * 2 > kind.largest) | (scales == least)).all()
    assert (scales >= least).all() and (scales == least).any()
    np.testing.assert_array_equal(arrays.power_of_two(amax, kind), scales)
    np.testing.assert_array_equal(float8.power_of_two(paddle.to_tensor(amax), kind=kind).numpy(), scales)


def test_zeros_have_scale_one():
    for scheme in SCHEMES:
        made = quantise(paddle.zeros([3, 256]), scheme, short=True)
        assert (made.scales.numpy() == 1).all() and not made.codes.numpy().any()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_schemes_are_equal_bit_for_bit_everywhere(kind, counts):
    x = wild(130, 261)
    for scheme in SCHEMES:
        for tensor in (paddle.to_tensor(x), paddle.to_tensor(x.T.copy()).T):
            made = quantise(tensor, scheme, kind=kind, counts=counts, short=True)
            plain = float8.quantise_plain(tensor, scheme, kind=kind, counts=counts, scale=None, name="")
            parts = np.split(x, np.cumsum(counts)[:-1])
            by_numpy = [arrays.quantised(part, scheme, kind=kind) for part in parts if len(part)]
            again = [arrays.dense(*pair, scheme, kind=kind) for pair in by_numpy]
            codes, scales = (np.concatenate(found) for found in zip(*by_numpy, strict=True))
            for found in (made, plain):
                assert found.codes.numpy().tobytes() == codes.tobytes(), scheme
                assert found.scales.numpy().tobytes() == scales.tobytes(), scheme
                assert found.scales.shape == list(scales.shape)
            for numbers in (dense(made), float8.dense_plain(plain)):
                assert numbers.numpy().tobytes() == np.concatenate(again).tobytes(), scheme


@pytest.mark.parametrize("scheme", [Blocks(), Blocks(3, 5), Columns(), Rows(), Tensor()], ids=str)
def test_a_stack_is_its_matrices(scheme):
    x = wild(3, 130, 261)
    made = quantise(paddle.to_tensor(x), scheme, short=True)
    plain = float8.quantise_plain(paddle.to_tensor(x), scheme, kind=E4M3, counts=[130] * 3, scale=None, name="")
    for e, matrix in enumerate(x):
        codes, scales = arrays.quantised(matrix, scheme)
        for found in (made, plain):
            np.testing.assert_array_equal(found.codes.numpy()[e], codes)
            np.testing.assert_array_equal(found.scales.numpy()[e], scales)
        np.testing.assert_array_equal(dense(made).numpy()[e], arrays.dense(codes, scales, scheme))
    assert dense(made).numpy().tobytes() == float8.dense_plain(made).numpy().tobytes()


def test_given_scales_of_a_stack():
    x, scales = drawn(3, 8, 32), np.array([0.01, 0.003, 7.0], "float32")
    made = quantise(paddle.to_tensor(x), Tensor(), scale=paddle.to_tensor(scales))
    fitting = np.clip(x / scales[:, None, None], -448, 448)
    np.testing.assert_array_equal(made.codes.numpy(), nearest(fitting, E4M3))
    np.testing.assert_array_equal(made.scales.numpy(), scales.reshape(3, 1, 1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_errors_stay_within_half_a_step(kind):
    bits = 3 if kind is E4M3 else 2
    least, spacing = (2.0**-6, 2.0**-9) if kind is E4M3 else (2.0**-14, 2.0**-16)
    x = wild(64, 512)
    made = quantise(paddle.to_tensor(x), Rows(), kind=kind)
    scale = made.scales.numpy().repeat(128, 1).astype("float64")
    error = np.abs(dense(made).numpy().astype("float64") - x)
    normal = np.abs(x) >= least * scale
    assert normal.any() and not normal.all()
    assert (error <= np.abs(x) * 2.0 ** -(bits + 1))[normal].all()
    assert (error <= scale * spacing / 2 + 2.0**-150)[~normal].all()  # fp32 itself ends at 2^-149
    powers = np.float32(2.0) ** np.random.default_rng(0).integers(-6, 3, [8, 128]).astype("float32")
    np.testing.assert_array_equal(float8.rounded(paddle.to_tensor(powers), Rows(), kind=kind).numpy(), powers)


def test_quantised_again_nothing_changes():
    """What lets rows travel in FP8 and be quantised once more where they arrive."""
    x = paddle.to_tensor(np.concatenate([wild(200, 256), np.linspace(224, 240, 256, dtype="float32")[None]]))
    once = float8.rounded(x, Rows())
    assert float8.rounded(once, Rows()).numpy().tobytes() == once.numpy().tobytes()


def test_short_blocks_must_be_allowed():
    for scheme, shape in ((Rows(), (4, 130)), (Blocks(), (128, 130)), (Blocks(), (130, 128))):
        with pytest.raises(AssertionError, match=r"up_proj: .* is no multiple of"):
            quantise(paddle.zeros(shape), scheme, name="up_proj")
    quantise(paddle.zeros([5, 130]), Columns())


def test_statistics_of_a_cast():
    x = np.zeros([1, 8], "float32")
    x[0, :5] = [448.0, -500.0, 2.0**-11, 2.0**-10, 1.0]  # to zero: the third and, to even, the fourth
    given = quantise(paddle.to_tensor(x), Tensor(), scale=paddle.ones([1]))
    assert float8.statistics(paddle.to_tensor(x), given) == (500.0, 2 / 8, 1 / 8)
    made = quantise(paddle.to_tensor(x), Tensor())
    assert float8.statistics(paddle.to_tensor(x), made) == (500.0, 2 / 8, 0.0)
    assert float8.statistics(paddle.zeros([0, 8]), quantise(paddle.zeros([0, 8]), Rows(8))) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(0, 3), (7,), (3, 5, 2)], ids=str)
def test_bf16_numbers(shape):
    x = wild(*shape)
    turned = list(range(x.ndim))[::-1]
    given = paddle.to_tensor(x)
    assert float8.bf16_numbers(given).numpy().tobytes() == _to_bf16(x).tobytes()
    assert given.numpy().tobytes() == x.tobytes()
    np.testing.assert_array_equal(float8.bf16_numbers(given.transpose(turned)).numpy(), _to_bf16(x).T)


def _to_bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype("float32")


def assert_bf16_of(found: paddle.Tensor, exact: np.ndarray) -> None:
    """bf16 numbers, off by no more than their rounding and that of sums in fp32."""
    got = found.numpy()
    np.testing.assert_array_equal(_to_bf16(got), got)
    assert (np.abs(got - exact) <= np.abs(exact) * 2.0**-8 + np.abs(exact).max(initial=0) * 1e-5).all()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("counts", [[40], [0, 17, 0, 20, 3], [0]], ids=str)
@pytest.mark.parametrize("schemes", [(Rows(), Blocks()), (Tensor(), Tensor()), (Rows(), Tensor())], ids=str)
def test_products_against_fp64(schemes, counts, plain, monkeypatch):
    if plain:
        monkeypatch.setenv("ERNIEKIT_PLAIN_OPS", "1")
    how, rows = {"counts": counts}, sum(counts)
    x = quantise(paddle.to_tensor(drawn(rows, 256)), schemes[0], scale=_odd(schemes[0], 1))
    w = quantise(
        paddle.to_tensor(drawn(len(counts), 256, 128)), schemes[1], scale=_odd(schemes[1], len(counts))
    )  # fmt: skip
    grad = quantise(paddle.to_tensor(drawn(rows, 128, seed=1)), schemes[0], scale=_odd(schemes[0], 1))
    x64, w64, grad64 = (dense(held).numpy().astype("float64") for held in (x, w, grad))
    of_expert = np.repeat(np.arange(len(counts)), counts)
    y64 = np.einsum("td,tdf->tf", x64, w64[of_expert])
    assert_bf16_of(float8.product(x, w, **how), y64)
    exact = float8.product(x, w, out="fp32", **how).numpy()
    np.testing.assert_allclose(exact, y64, rtol=0, atol=1e-5 * np.abs(y64).max(initial=0))
    assert_bf16_of(
        float8.product(grad, w, turned=True, **how), np.einsum("tf,tdf->td", grad64, w64[of_expert])
    )  # fmt: skip
    if len(counts) == 1:
        one = float8.Float8(w.codes[0], w.scales[0], w.scheme, w.kind, w.counts)
        np.testing.assert_array_equal(float8.product(x, one, out="fp32").numpy(), exact)


def _odd(scheme, size):
    """Scales that are no powers of two, where the scheme takes any."""
    return paddle.linspace(0.0113, 0.0171, size) if isinstance(scheme, Tensor) else None


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("counts", [[300], [0, 129, 0, 128, 43]], ids=str)
def test_weight_products_against_fp64(counts, plain, monkeypatch):
    if plain:
        monkeypatch.setenv("ERNIEKIT_PLAIN_OPS", "1")
    rows = sum(counts)
    values = drawn(rows, 256), drawn(rows, 128, seed=1)
    x = quantise(float8.rounded(paddle.to_tensor(values[0]), Rows()), Columns(), counts=counts)
    grad = quantise(paddle.to_tensor(values[1]), Columns(), counts=counts)
    stops = np.cumsum(counts)[:-1]

    def each(a, b):
        pairs = zip(np.split(a, stops), np.split(b, stops), strict=True)
        return np.stack([left.T.astype("float64") @ right for left, right in pairs])

    found = float8.weight_product(x, grad, counts=counts).numpy()
    expected = each(dense(x).numpy(), dense(grad).numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    full = each(*values)
    cosine = (found * full).sum() / np.sqrt((found * found).sum() * (full * full).sum())
    assert cosine > 0.998  # x is quantised twice, g once
    if len(counts) == 1:
        np.testing.assert_array_equal(float8.weight_product(x, grad).numpy(), found[0])


@pytest.mark.parametrize("counts", [[40], [0, 17, 0, 20, 3]], ids=str)
def test_products_with_a_scale_for_every_expert(counts):
    """Also where some have no rows, and so no scale."""
    x = quantise(paddle.to_tensor(wild(40, 64)), Tensor(), counts=counts)
    grad = quantise(paddle.to_tensor(wild(40, 32, seed=1)), Tensor(), counts=counts)
    assert x.scales.shape == [sum(map(bool, counts)), 1]
    weight = quantise(paddle.to_tensor(drawn(len(counts), 64, 32)), Tensor(), scale=_odd(Tensor(), len(counts)))
    x64, grad64, w64 = (dense(held).numpy().astype("float64") for held in (x, grad, weight))
    stops = np.cumsum(counts)[:-1]
    found = float8.product(x, weight, counts=counts, out="fp32").numpy()
    made = float8.weight_product(x, grad, counts=counts).numpy()
    parts = zip(*(np.split(a, stops) for a in (x64, grad64, found)), made, w64, strict=True)
    for rows, grads, got, got_weight, w in parts:
        for one, exact in ((got, rows @ w), (got_weight, rows.T @ grads)):
            np.testing.assert_allclose(one, exact, rtol=0, atol=1e-5 * np.abs(exact).max(initial=0))


def test_without_a_gpu_there_is_no_fp8():
    if not paddle.device.is_compiled_with_cuda():
        assert not float8.has_float8()
