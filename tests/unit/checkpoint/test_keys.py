"""Views see what they should, and writing through them lands in the tensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from erniekit.checkpoint.keys import assign, columns, expert, head_triplets, split_heads, transposed, whole

HIDDEN, HEADS, DIM = 5, 3, 2


def test_columns_of_a_fused_matrix_and_of_a_fused_bias():
    fused = np.arange(12).reshape(2, 6)  # [in, outs]
    np.testing.assert_array_equal(columns(1, 3)(fused), [[1, 7], [2, 8]])
    np.testing.assert_array_equal(columns(1, 3)(fused[0]), [1, 2])


def test_head_triplets_are_stored_head_by_head():
    # Column h * 3 * DIM + which * DIM + d holds q, k or v (`which`) of head h.
    fused = np.arange(HIDDEN * HEADS * 3 * DIM).reshape(HIDDEN, -1)
    for which in range(3):
        seen = head_triplets(which, HEADS)(fused)
        assert seen.shape == (HEADS, DIM, HIDDEN)
        for h in range(HEADS):
            for d in range(DIM):
                np.testing.assert_array_equal(seen[h, d], fused[:, h * 3 * DIM + which * DIM + d])
        bias = head_triplets(which, HEADS)(fused[0])
        np.testing.assert_array_equal(bias, seen[..., 0])


def test_an_expert_of_a_stack():
    stack = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.testing.assert_array_equal(expert(1, columns(2, 4))(stack), stack[1][:, 2:].T)


@pytest.mark.parametrize(
    "view",
    [whole, transposed, columns(3, 9), split_heads(columns(6, 12), 3), head_triplets(1, 3), split_heads(transposed, 9)],
)
def test_writing_through_a_view_reaches_the_tensor_and_nothing_else(view):
    tensor = np.zeros((40, 18), np.float32)
    piece = np.arange(view(tensor).size, dtype=np.float32).reshape(view(tensor).shape) + 1
    assign(view(tensor), piece)
    np.testing.assert_array_equal(view(tensor), piece)
    assert np.count_nonzero(tensor) == piece.size


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (7, 4, 33), (600, 48), (48, 600), (9, 200, 20), (0, 3)])
@pytest.mark.parametrize("target_order", ["C", "F"])
@pytest.mark.parametrize("source_order", ["C", "F"])
def test_assign_in_blocks_equals_a_plain_copy(shape, target_order, source_order):
    source = np.asarray(np.random.default_rng(0).standard_normal(shape), order=source_order)
    target = np.zeros(shape, order=target_order)
    assign(target, source)
    np.testing.assert_array_equal(target, source)


def test_assign_splits_axes_of_the_source():
    target = np.zeros((2, 3, 4))
    assign(target, np.arange(24.0).reshape(6, 4))
    np.testing.assert_array_equal(target.reshape(6, 4), np.arange(24.0).reshape(6, 4))


def test_assign_rounds_to_the_nearest_even_bfloat16():
    exact = np.array([[1.0, 1 + 2**-8, 1 + 2**-8 + 2**-16, 1 + 3 * 2**-8]], np.float32)
    target = np.zeros((1, 4), ml_dtypes.bfloat16)
    assign(target, exact)
    np.testing.assert_array_equal(target.astype(np.float32), [[1.0, 1.0, 1 + 2**-7, 1 + 2**-6]])
