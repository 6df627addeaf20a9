"""Paddle's weight-only kernels behind our seam: which weights they serve, and on a GPU the products themselves."""

from __future__ import annotations

import inspect

import paddle
import pytest
from paddle.nn.quant import weight_dequantize, weight_only_linear, weight_quantize

from erniekit.ops.weight_only import quantized, serves, weight_only_product
from tests.unit.ops.twins import drawn


@pytest.mark.parametrize(
    ("kind", "num_in", "num_out", "group_size", "served"),
    [
        ("int8", 128, 64, None, True), ("int4", 64, 192, 64, True), ("int8", 128, 64, 128, True),
        ("nf4", 128, 64, 64, False), ("int8", 100, 64, None, False), ("int4", 64, 40, None, False),
        ("int8", 128, 64, 32, False),
    ],
)  # fmt: skip
def test_what_has_kernels(kind, num_in, num_out, group_size, served):
    assert serves(kind, num_in, num_out, group_size) == served


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (weight_quantize, {"x", "algo", "group_size"}), (weight_dequantize, {"x", "scale", "algo", "group_size"}),
        (weight_only_linear, {"x", "weight", "weight_scale", "weight_dtype", "group_size"}),
    ],
)  # fmt: skip
def test_paddle_has_what_is_called(function, names):
    """All that can be judged without a GPU."""
    assert names <= set(inspect.signature(function).parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [None, 64])
def test_the_product_is_that_of_the_dense_weight(kind, group_size):
    weights = [paddle.to_tensor(drawn(128, 64, seed=e)).astype("bfloat16") for e in range(3)]
    packed = [quantized(weight, kind, group_size=group_size) for weight in weights]
    x = paddle.to_tensor(drawn(9, 128)).astype("bfloat16")
    x.stop_gradient = False
    found = weight_only_product(x, packed, counts=[4, 0, 5])
    found.astype("float32").sum().backward()
    dense = [weight.dense().astype("float32") for weight in packed]
    x32 = x.detach().astype("float32")
    want = paddle.concat([x32[:4] @ dense[0], x32[4:] @ dense[2]])
    assert float((found.astype("float32") - want).abs().max()) < 2e-2 * float(want.abs().max())
    grads = paddle.concat([dense[0].sum(1).expand([4, 128]), dense[2].sum(1).expand([5, 128])])
    assert float((x.grad.astype("float32") - grads).abs().max()) < 2e-2 * float(grads.abs().max())
