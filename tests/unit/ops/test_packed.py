"""Products with packed weights: compiled, in numpy and plain, beside the product with the dense weight."""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest

from erniekit.ops.mlp import linear
from erniekit.ops.packed import packed_product, packed_product_plain, unpack, unpack_plain
from erniekit.precision.quantize import KERNEL_KINDS, dense, pack
from tests.unit.ops.twins import assert_close, assert_same_bits, assert_twins, drawn, outputs_and_gradients

KINDS = list(KERNEL_KINDS)
# inputs, outputs, group size
SHAPES = [(1, 1, None), (7, 5, None), (9, 4, 3), (130, 33, 65), (64, 40, 16)]


def packed(num_in, num_out, group_size, kind, *, experts=1):
    """Codes and scales as tensors, and the dense weights."""
    made = [pack(drawn(num_in, num_out, seed=e), kind, group_size, name="w") for e in range(experts)]
    codes, scales = (paddle.to_tensor(np.stack(arrays)) for arrays in zip(*made, strict=True))
    return codes, scales, np.stack([dense(c, s, kind, num_in) for c, s in made])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_is_equal_bit_for_bit_everywhere(shape, kind):
    codes, scales, weights = packed(*shape, kind, experts=2)
    for expert, weight in enumerate(weights):
        for way in (unpack, unpack_plain):
            found = way(codes[expert], scales[expert], num_in=shape[0], kind=KERNEL_KINDS[kind])
            assert found.numpy().tobytes() == weight.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 0, 13, 1, 0], [64, 65], [0, 0]], ids=str)
def test_product(counts, kind):
    codes, scales, weights = packed(10, 12, 5, kind, experts=len(counts))
    how = {"counts": counts, "kind": KERNEL_KINDS[kind]}
    arrays = {"x": drawn(sum(counts), 10)}
    fast = functools.partial(packed_product, codes_ECF=codes, scales_EGF=scales, **how)
    plain = functools.partial(packed_product_plain, codes_ECF=codes, scales_EGF=scales, **how)
    assert_twins(lambda x: fast(x), lambda x: plain(x), arrays)

    def through_dense(x):
        stops = np.cumsum(counts).tolist()
        rows = [x[stop - count : stop] for stop, count in zip(stops, counts, strict=True)]
        return paddle.concat([part @ paddle.to_tensor(weight) for part, weight in zip(rows, weights, strict=True)])

    found = outputs_and_gradients(lambda x: fast(x), arrays)
    assert_close(found, outputs_and_gradients(through_dense, arrays))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_made_in_several_blocks(rows, kind, monkeypatch):
    """As many numbers as need two blocks at least, whose edges are no edges of groups and of bytes."""
    monkeypatch.setattr("erniekit.ops.arrays.packed.MANY", 1000 * 601)  # csrc/packed.cpp has blocks of 4 million
    num_in = 4200 if rows >= 32 else 603
    codes, scales, weights = packed(num_in, 1001, 3, kind)
    how = {"counts": [rows], "kind": KERNEL_KINDS[kind]}
    arrays = {"x": drawn(rows, num_in)}
    found = outputs_and_gradients(lambda x: packed_product(x, codes, scales, **how), arrays)
    assert_close(found, outputs_and_gradients(lambda x: x @ paddle.to_tensor(weights[0]), arrays))
    assert_same_bits(outputs_and_gradients(lambda x: packed_product(x, codes, scales, **how), arrays), found)


@pytest.mark.parametrize("kind", KINDS)
def test_in_one_block_it_is_the_dense_product_bit_for_bit(kind):
    codes, scales, weights = packed(48, 40, 16, kind)
    arrays = {"x": drawn(21, 48)}
    found = outputs_and_gradients(
        lambda x: packed_product(x, codes, scales, counts=[21], kind=KERNEL_KINDS[kind]), arrays
    )  # fmt: skip
    assert_same_bits(found, outputs_and_gradients(lambda x: linear(x, paddle.to_tensor(weights[0]), None), arrays))


def test_bf16_products_round_both_inputs():
    from erniekit.ops.wheel import has_bf16_products

    if not has_bf16_products():
        pytest.skip("needs avx512_bf16 or amx_bf16")
    codes, scales, weights = packed(48, 40, None, "int8")
    arrays = {"x": drawn(21, 48)}
    found = outputs_and_gradients(
        lambda x: packed_product(x, codes, scales, counts=[21], kind=KERNEL_KINDS["int8"], bf16=True), arrays
    )  # fmt: skip
    weight = paddle.to_tensor(weights[0])
    assert_same_bits(found, outputs_and_gradients(lambda x: linear(x, weight, None, bf16=True), arrays))


def test_fp64_takes_the_plain_path():
    codes, scales, weights = packed(8, 6, 4, "int4")
    x = paddle.to_tensor(drawn(5, 8).astype("float64"))
    found = packed_product(x, codes, scales, counts=[5], kind=KERNEL_KINDS["int4"])
    assert found.dtype == paddle.float64
    np.testing.assert_allclose(found.numpy(), x.numpy() @ weights[0].astype("float64"), rtol=1e-14)
