"""The product of adapters beside its plain twin and beside the merged weight."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.low_rank import grouped_low_rank, grouped_low_rank_plain, low_rank, low_rank_plain
from tests.unit.ops.twins import assert_twins, drawn

FROZEN = [(), ("x",), ("y",), ("a", "b"), ("a",), ("x", "y", "b")]


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 12), (130, 7)])
def test_low_rank(shape, frozen):
    *rows, size = shape
    arrays = {"x": drawn(*shape), "y": drawn(*rows, 10, seed=1), "a": drawn(size, 3, seed=2), "b": drawn(3, 10, seed=3)}
    assert_twins(
        lambda x, y, a, b: low_rank(x, y, a, b, scale=1.5), lambda x, y, a, b: low_rank_plain(x, y, a, b, scale=1.5),
        arrays, frozen=frozen,
    )  # fmt: skip


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 0, 13, 1, 0], [64, 65], [0, 0]])
def test_grouped_low_rank(counts, frozen):
    rows, experts = sum(counts), len(counts)
    arrays = {
        "x": drawn(rows, 12), "y": drawn(rows, 10, seed=1), "a": drawn(experts, 12, 3, seed=2),
        "b": drawn(experts, 3, 10, seed=3),
    }  # fmt: skip
    assert_twins(
        lambda x, y, a, b: grouped_low_rank(x, y, a, b, counts=counts, scale=0.5),
        lambda x, y, a, b: grouped_low_rank_plain(x, y, a, b, counts=counts, scale=0.5), arrays, frozen=frozen,
    )  # fmt: skip


def test_it_is_the_product_with_the_merged_weight():
    x, weight, a, b = drawn(9, 12), drawn(12, 10, seed=1), drawn(12, 3, seed=2), drawn(3, 10, seed=3)
    found = low_rank(*map(paddle.to_tensor, (x, x @ weight, a, b)), scale=2.0)
    np.testing.assert_allclose(found.numpy(), x @ (weight + 2.0 * a @ b), rtol=1e-4, atol=1e-4)
