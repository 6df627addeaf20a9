"""Sorting, permuting, combining and the grouped MLP beside their plain twins."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.grouped import (
    add_up,
    add_up_plain,
    combine,
    combine_plain,
    grouped_linear,
    grouped_linear_plain,
    grouped_mlp,
    grouped_mlp_plain,
    permute,
    permute_plain,
    permute_weights,
    sort_by_expert,
    sort_by_expert_plain,
)
from erniekit.ops.mlp import gated
from tests.unit.ops.twins import assert_twins, drawn

# tokens, choices, experts, hidden size, width
SIZES = [(1, 1, 1, 1, 1), (1, 2, 4, 8, 3), (37, 2, 8, 24, 10), (64, 3, 5, 16, 32), (20, 4, 64, 7, 5)]


def routed(tokens, choices, experts):
    rng = np.random.default_rng([tokens, choices, experts])
    return paddle.to_tensor(np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype("int64"))


@pytest.mark.parametrize("sizes", SIZES)
def test_sort(sizes):
    tokens, choices, experts = sizes[:3]
    ids = routed(tokens, choices, experts)
    found, want = sort_by_expert(ids, num_experts=experts), sort_by_expert_plain(ids, num_experts=experts)
    assert found.counts == want.counts
    assert found.token_T.numpy().tolist() == want.token_T.numpy().tolist()
    assert found.place_MC.numpy().tolist() == want.place_MC.numpy().tolist()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_id_that_is_no_expert_is_refused(wrong):
    with pytest.raises(AssertionError, match="routed row 2 names no expert of 3"):
        sort_by_expert(paddle.to_tensor([[0, 2], [wrong, 1]]), num_experts=3)


@pytest.mark.parametrize("sizes", SIZES)
def test_permute(sizes):
    tokens, choices, experts, size, _ = sizes
    order = sort_by_expert(routed(tokens, choices, experts), num_experts=experts)
    assert_twins(lambda x: permute(x, order), lambda x: permute_plain(x, order), {"x": drawn(tokens, size)})


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("frozen", [(), ("y",), ("weights",)])
def test_combine(sizes, frozen):
    tokens, choices, experts, size, _ = sizes
    order = sort_by_expert(routed(tokens, choices, experts), num_experts=experts)
    arrays = {"y": drawn(tokens * choices, size), "weights": drawn(tokens, choices, seed=1)}
    assert_twins(
        lambda y, weights: combine(y, weights, order), lambda y, weights: combine_plain(y, weights, order), arrays,
        frozen=frozen,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
def test_add_up(sizes):
    tokens, choices, experts, size, _ = sizes
    order = sort_by_expert(routed(tokens, choices, experts), num_experts=experts)
    arrays = {"y": drawn(tokens * choices, size)}
    assert_twins(lambda y: add_up(y, order), lambda y: add_up_plain(y, order), arrays)


@pytest.mark.parametrize("sizes", SIZES)
def test_rows_times_their_weights_added_up_are_the_weighted_sum(sizes):
    tokens, choices, experts, size, _ = sizes
    order = sort_by_expert(routed(tokens, choices, experts), num_experts=experts)
    arrays = {"y": drawn(tokens * choices, size), "weights": drawn(tokens, choices, seed=1)}
    assert_twins(
        lambda y, weights: add_up(y * permute_weights(weights, order).unsqueeze(-1), order),
        lambda y, weights: combine(y, weights, order), arrays,
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [(), ("x",), ("gate_up",), ("down",), ("gate_up", "down")])
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 0, 13, 1, 0], [64, 65], [0, 0]])
def test_grouped_mlp(counts, frozen):
    experts, size, width = len(counts), 12, 10
    arrays = {
        "x": drawn(sum(counts), size),
        "gate_up": drawn(experts, size, 2 * width, seed=1),
        "down": drawn(experts, width, size, seed=2),
    }
    assert_twins(
        lambda x, gate_up, down: grouped_mlp(x, gate_up, down, counts=counts),
        lambda x, gate_up, down: grouped_mlp_plain(x, gate_up, down, counts=counts), arrays, frozen=frozen,
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",)])
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 0, 13, 1, 0], [64, 65], [0, 0]])
def test_grouped_linear(counts, frozen):
    arrays = {"x": drawn(sum(counts), 12), "weight": drawn(len(counts), 12, 10, seed=1)}
    assert_twins(
        lambda x, weight: grouped_linear(x, weight, counts=counts),
        lambda x, weight: grouped_linear_plain(x, weight, counts=counts), arrays, frozen=frozen,
    )  # fmt: skip


@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 13], [64, 65]])
def test_two_grouped_products_make_the_grouped_mlp_bit_for_bit(counts):
    """So a model with adapters that add nothing computes what it computes without them."""
    x, gate_up, down = (drawn(sum(counts), 12), drawn(len(counts), 12, 20, seed=1), drawn(len(counts), 10, 12, seed=2))
    x, gate_up, down = map(paddle.to_tensor, (x, gate_up, down))
    whole = grouped_mlp(x, gate_up, down, counts=counts)
    parts = grouped_linear(gated(grouped_linear(x, gate_up, counts=counts)), down, counts=counts)
    assert whole.numpy().tobytes() == parts.numpy().tobytes()


def test_an_expert_without_rows_has_a_zero_gradient():
    weights = [paddle.to_tensor(drawn(3, 4, 6)), paddle.to_tensor(drawn(3, 3, 4))]
    for weight in weights:
        weight.stop_gradient = False
    grouped_mlp(paddle.to_tensor(drawn(5, 4)), *weights, counts=[2, 0, 3]).sum().backward()
    for weight in weights:
        assert not weight.grad.numpy()[1].any()
        assert weight.grad.numpy()[0].any()
