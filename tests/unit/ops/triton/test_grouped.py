"""Products of sorted rows in Triton's interpreter against fp64 products of the same operands (extra `parity`)."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import paddle
import pytest

from erniekit.ops import float8
from tests.unit.ops.triton.frames import Frame, cut_out

grouped = pytest.importorskip("erniekit.ops.triton.grouped", reason="needs triton (extra parity)")
quantise = pytest.importorskip("erniekit.ops.triton.quantise", reason="needs triton (extra parity)")
pytestmark = pytest.mark.parity
COUNTS = [5, 0, 130, 1]  # fewer rows than a tile, none, more than one tile
ROWS, K, N, EXPERTS = sum(COUNTS), 256, 160, len(COUNTS)
ENDS = np.cumsum(COUNTS)


def drawn(*shape: int, seed: int) -> paddle.Tensor:
    """Numbers whose scales differ from expert to expert, from row to row, and along a row."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-2, 3, [*shape[:-1], 1])
    x *= 2.0 ** np.arange(shape[0]).reshape([-1, *[1] * (len(shape) - 1)]) if len(shape) == 3 else 1.0
    return paddle.to_tensor((x * 2.0 ** (np.arange(shape[-1]) // 128)).astype("float32"))


def empty(*shape: int, dtype: str) -> paddle.Tensor:
    return paddle.full(shape, float("nan"), dtype)


def ends() -> paddle.Tensor:
    return paddle.to_tensor(ENDS.astype("int32"))


def exact(x: paddle.Tensor) -> np.ndarray:
    return x.astype("float32").numpy().astype(np.float64)


def of_experts() -> Iterator[tuple[int, slice]]:
    yield from ((expert, slice(end - count, end)) for expert, (count, end) in enumerate(zip(COUNTS, ENDS, strict=True)))


def rounds_to(found: np.ndarray, expected: np.ndarray) -> None:
    """Within an ulp of bf16, and almost everywhere the nearest: sums in fp32 may decide a middle otherwise."""
    nearest = expected.astype(np.float32).astype(ml_dtypes.bfloat16)
    differ = found.astype(np.float32) != nearest.astype(np.float32)
    assert differ.mean() < 2e-3
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-6 * np.abs(expected).max())


def quantised_weight(w: paddle.Tensor) -> tuple[float8.Float8, paddle.Tensor]:
    held = float8.quantise(w, float8.Blocks(), short=True)
    return held, held.codes.transpose([0, 2, 1]).contiguous()


@pytest.mark.parametrize("setting", [grouped.FLOAT8[0], grouped.FLOAT8[2]], ids=["128 rows", "64 rows"])
def test_forward_in_fp8(setting):
    x, (w, turned) = float8.quantise(drawn(ROWS, K, seed=0), float8.Rows()), quantised_weight(drawn(4, K, N, seed=1))
    y, w_scales = Frame(ROWS, N, dtype="bfloat16", gap=136), w.scales.transpose([0, 2, 1])
    rows = cut_out(x.codes, gap=140), cut_out(x.scales, gap=3)
    grouped.product8(rows, (turned, w_scales), y.inner, ends=ends(), setting=setting)
    dense_x, dense_w = exact(float8.dense(x)), exact(float8.dense(w))
    rounds_to(y.numbers(), np.concatenate([dense_x[rows] @ dense_w[expert] for expert, rows in of_experts()]))


@pytest.mark.parametrize("kind", [float8.E4M3, float8.E5M2], ids=lambda kind: kind.name)
def test_gradient_of_rows_in_fp8(kind):
    """The summed dimension, N, ends in a short block."""
    g = float8.quantise(drawn(ROWS, N, seed=2), float8.Rows(), kind=kind, short=True)
    w, _ = quantised_weight(drawn(4, K, N, seed=1))
    grad_x, rows = Frame(ROWS, K, dtype="bfloat16", gap=136), (cut_out(g.codes, gap=140), cut_out(g.scales, gap=3))
    grouped.product8(rows, (w.codes, w.scales), grad_x.inner, ends=ends(), x_e5m2=kind is float8.E5M2)
    dense_g, dense_w = exact(float8.dense(g)), exact(float8.dense(w))
    rounds_to(grad_x.numbers(), np.concatenate([dense_g[rows] @ dense_w[expert].T for expert, rows in of_experts()]))


def along_tokens(rows: paddle.Tensor, *, e5m2: bool) -> tuple[paddle.Tensor, paddle.Tensor]:
    codes = paddle.zeros([rows.shape[1], quantise.padded_rows(ROWS, EXPERTS)], "uint8")
    scales = empty(codes.shape[1] // 128, rows.shape[1], dtype="float32")
    quantise.quantise_columns(rows, codes, scales, ends=ends(), e5m2=e5m2)
    return codes, scales


@pytest.mark.parametrize("kind", [float8.E4M3, float8.E5M2], ids=lambda kind: kind.name)
def test_gradient_of_weights_in_fp8(kind):
    """From rows to columns to the product, as training does it, added to what is there if the gradient is E4M3; and
    against the unquantised."""
    x, g, add = drawn(ROWS, K, seed=0), drawn(ROWS, N, seed=2), kind is float8.E4M3
    out = Frame(EXPERTS, K, N, dtype="float32", gap=136)
    if add:
        out.inner.fill_(1.0)
    sides = along_tokens(x, e5m2=False), along_tokens(g, e5m2=not add)
    grouped.weight_product8(*sides, out.inner, ends=ends(), add=add, g_e5m2=not add)
    dense_x, dense_g = (
        exact(float8.dense(float8.quantise(rows, float8.Columns(), kind=kind, counts=COUNTS, short=True)))
        for rows, kind in ((x, float8.E4M3), (g, kind))
    )
    expected = np.stack([dense_x[rows].T @ dense_g[rows] for _, rows in of_experts()])
    np.testing.assert_allclose(out.numbers(), expected + add, rtol=0, atol=1e-6 * np.abs(expected).max())
    whole = np.stack([exact(x)[rows].T @ exact(g)[rows] for _, rows in of_experts()])
    cosine = (whole * expected).sum() / np.sqrt((whole**2).sum() * (expected**2).sum())
    assert cosine > (0.999 if add else 0.997)


def test_forward_and_backward_in_bf16():
    shapes = ([ROWS, 200], [EXPERTS, 200, N], [ROWS, N])
    x, w, g = (drawn(*shape, seed=seed).astype("bfloat16") for seed, shape in enumerate(shapes))
    x, g = cut_out(x, gap=136), cut_out(g, gap=140)
    y, grad_x = Frame(ROWS, N, dtype="bfloat16", gap=144), Frame(ROWS, 200, dtype="bfloat16", gap=148)
    grad_w, added = (Frame(EXPERTS, 200, N, dtype=dtype, gap=152) for dtype in ("bfloat16", "float32"))
    added.inner.fill_(1.0)
    grouped.product16(x, w, y.inner, ends=ends(), setting=grouped.BF16[3])
    grouped.product16(g, w, grad_x.inner, ends=ends(), turned=True)
    grouped.weight_product16(x, g, grad_w.inner, ends=ends())
    grouped.weight_product16(x, g, added.inner, ends=ends(), add=True)
    x_, w_, g_ = exact(x), exact(w), exact(g)
    rounds_to(y.numbers(), np.concatenate([x_[rows] @ w_[expert] for expert, rows in of_experts()]))
    rounds_to(grad_x.numbers(), np.concatenate([g_[rows] @ w_[expert].T for expert, rows in of_experts()]))
    expected = np.stack([x_[rows].T @ g_[rows] for _, rows in of_experts()])
    rounds_to(grad_w.numbers(), expected)
    np.testing.assert_allclose(added.numbers(), expected + 1, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_tile_that_is_not_finite_shows():
    x, (_, turned) = float8.quantise(drawn(2, K, seed=0), float8.Rows()), quantised_weight(drawn(1, K, N, seed=1))
    x.scales[0, 0] = float("nan")
    y = empty(2, N, dtype="bfloat16")
    end = paddle.to_tensor([2], dtype="int32")
    grouped.product8((x.codes, x.scales), (turned, paddle.ones([1, 2, 2])), y, ends=end)
    assert np.isnan(exact(y)).all(1).tolist() == [True, False]
