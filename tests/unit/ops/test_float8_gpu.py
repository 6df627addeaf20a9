"""What Paddle's GPU kernels are handed, with stand-ins that compute what their docstrings say. The kernels themselves
were not run."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.base.errors import NotFinite
from erniekit.ops import float8
from erniekit.ops.float8 import E4M3, E5M2, Blocks, Columns, Rows, Tensor, dense, quantise
from tests.unit.ops.twins import drawn


@pytest.fixture(autouse=True)
def tier() -> None:
    """Nothing here runs on the CPU's kernels."""


@pytest.fixture
def asked(monkeypatch):
    """Pretend that all tensors are a GPU's; returns what the kernels were asked for."""
    calls: list[str] = []

    def cast(x, *, output_scale_transpose, quant_method):
        assert x.dtype == paddle.bfloat16 and not output_scale_transpose
        scheme = {"1x128": Rows(), "128x128": Blocks()}[quant_method]
        made = float8.quantise_plain(
            x.astype("float32"), scheme, kind=E4M3, counts=[x.shape[0]], scale=None, name=""
        )  # fmt: skip
        calls.append(quant_method)
        return made.codes.view("float8_e4m3fn"), made.scales

    def one(codes, scales, along_rows):
        high = 1 if along_rows else 128
        scales = scales.T if along_rows else scales
        assert codes.dtype == paddle.float8_e4m3fn and codes.shape[1] % 128 == 0 and codes.is_contiguous()
        assert scales.shape == [-(-codes.shape[0] // high), codes.shape[1] // 128], "scales of another shape"
        spread = scales.repeat_interleave(high, 0)[: codes.shape[0]].repeat_interleave(128, 1)
        return codes.astype("float32") * spread

    def gemm(a, a_scale, b, b_scale, out_dtype, *, is_a_1d_scaled, is_b_1d_scaled):
        assert a.shape[0] % 16 == 0 and b.shape[0] % 16 == 0
        calls.append(f"gemm {out_dtype}")
        return (one(a, a_scale, is_a_1d_scaled) @ one(b, b_scale, is_b_1d_scaled).T).astype(out_dtype)

    monkeypatch.setattr("erniekit.ops.float8.backend", lambda *_: "gpu")
    monkeypatch.setattr("erniekit.ops.float8_gpu.kernels.fp8_quant_blockwise", cast)
    monkeypatch.setattr("erniekit.ops.float8_gpu.kernels.fp8.fp8_gemm_blockwise", gemm)
    return calls


def bf16(*shape, seed=0):
    return float8.bf16_numbers(paddle.to_tensor(drawn(*shape, seed=seed)))


def plain(x: paddle.Tensor, scheme, **how):
    counts = how.pop("counts", [x.shape[-2]] * (x.shape[0] if x.ndim == 3 else 1))
    return float8.quantise_plain(x, scheme, kind=E4M3, counts=counts, scale=None, name="")


@pytest.mark.parametrize(("shape", "scheme"), [((5, 256), Rows()), ((256, 128), Blocks()), ((3, 128, 256), Blocks())])
def test_casts(asked, shape, scheme):
    x = bf16(*shape)
    found, expected = quantise(x, scheme), plain(x, scheme)
    assert asked == ["1x128" if scheme == Rows() else "128x128"] * (shape[0] if len(shape) == 3 else 1)
    np.testing.assert_array_equal(found.codes.numpy(), expected.codes.numpy())
    np.testing.assert_array_equal(found.scales.numpy(), expected.scales.numpy())
    with pytest.raises(NotFinite, match="the weight"):
        quantise(x / 0, scheme, name="the weight")


def test_casts_without_a_kernel_are_plain(asked):
    for scheme, how in ((Tensor(), {}), (Columns(), {}), (Rows(), {"kind": E5M2}), (Rows(64), {})):
        quantise(bf16(128, 128), scheme, **how)
    quantise(bf16(0, 128), Rows())
    assert asked == []


@pytest.mark.parametrize("counts", [[40], [0, 17, 0, 20, 3]], ids=str)
def test_products(asked, counts):
    x, grad, w = bf16(40, 256), bf16(40, 128, seed=1), bf16(len(counts), 256, 128)
    held = quantise(w, Blocks())
    numbers = dense(held).numpy()[np.repeat(np.arange(len(counts)), counts)]
    for rows, turned, how in ((x, False, "td,tdf->tf"), (grad, True, "tf,tdf->td")):
        asked.clear()
        cast = quantise(rows, Rows())
        found = float8.product(cast, held, turned=turned, counts=counts, out="fp32")
        expected = np.einsum(how, dense(cast).numpy(), numbers)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5 * np.abs(expected).max())
        assert asked == ["1x128", *["gemm float32"] * sum(map(bool, counts))]
    assert float8.product(quantise(x, Rows()), held, counts=counts).dtype == paddle.bfloat16
    one = quantise(w[0], Blocks())
    assert float8.product(quantise(x, Rows()), one).shape == [40, 128]


@pytest.mark.parametrize("counts", [[300], [0, 129, 0, 128, 43]], ids=str)
def test_weight_products(asked, counts):
    x, grad = (quantise(bf16(300, width), Columns(), counts=counts) for width in (256, 128))
    asked.clear()
    found = float8.weight_product(x, grad, counts=counts).numpy()
    stops = np.cumsum(counts)[:-1]
    pairs = zip(np.split(dense(x).numpy(), stops), np.split(dense(grad).numpy(), stops), strict=True)
    expected = np.stack([a.T @ b for a, b in pairs])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert asked == ["gemm float32"] * sum(map(bool, counts))


def test_products_without_a_kernel_are_plain(asked):
    x, w = quantise(bf16(3, 256), Tensor()), quantise(bf16(256, 128), Tensor())
    expected = dense(x).numpy() @ dense(w).numpy()
    np.testing.assert_allclose(float8.product(x, w, out="fp32").numpy(), expected, atol=1e-4)
    assert asked == []
