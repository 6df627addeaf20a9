"""Log-probabilities of labels beside their plain twin, and the twin beside a softmax of all logits."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.log_probs import linear_log_probs, linear_log_probs_plain
from tests.unit.ops.test_cross_entropy import SIZES, arrays_of, labelled
from tests.unit.ops.twins import assert_close, assert_twins, drawn, outputs_and_gradients


def of(op, labels, *, vocab_first):
    return lambda hidden, weight, bias=None: op(
        hidden, weight, paddle.to_tensor(labels), vocab_first=vocab_first, bias_V=bias
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_twins(sizes, vocab_first, bias):
    labels = labelled(sizes[0], sizes[2], ignored=0.0)
    arrays = arrays_of(*sizes, vocab_first=vocab_first, bias=bias)
    ops = (of(op, labels, vocab_first=vocab_first) for op in (linear_log_probs, linear_log_probs_plain))
    assert_twins(*ops, arrays)


@pytest.mark.parametrize("vocab_first", [False, True])
def test_the_twin_is_the_logarithm_of_a_softmax(vocab_first):
    labels = labelled(1100, 50, ignored=0.0)

    def whole(hidden, weight, bias):
        logits = paddle.matmul(hidden, weight, transpose_y=vocab_first) + bias
        return paddle.nn.functional.log_softmax(logits)[paddle.arange(1100), paddle.to_tensor(labels)]

    arrays = arrays_of(1100, 16, 50, vocab_first=vocab_first, bias=True)
    found = outputs_and_gradients(of(linear_log_probs_plain, labels, vocab_first=vocab_first), arrays)
    assert_close(found, outputs_and_gradients(whole, arrays))


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
def test_frozen_inputs_get_no_gradient(frozen):
    labels = labelled(9, 11, ignored=0.0)
    ops = (of(op, labels, vocab_first=True) for op in (linear_log_probs, linear_log_probs_plain))
    assert_twins(*ops, arrays_of(9, 6, 11, vocab_first=True, bias=True), frozen=frozen)


def test_no_rows_at_all():
    """A micro-batch may hold no answer, and the head's gradient is zero then."""
    for op in (linear_log_probs, linear_log_probs_plain):
        weight = paddle.to_tensor(drawn(5, 3), stop_gradient=False)
        found = op(paddle.zeros([0, 3]), weight, paddle.zeros([0], "int64"), vocab_first=True)
        assert found.shape == [0]
        found.sum().backward()
        assert weight.grad is None or not weight.grad.numpy().any()


def test_bf16_products_stay_near():
    arrays, labels = arrays_of(64, 32, 50, vocab_first=True, bias=False), labelled(64, 50, ignored=0.0)
    exact = outputs_and_gradients(of(linear_log_probs, labels, vocab_first=True), arrays)

    def rounded(hidden, weight):
        return linear_log_probs(hidden, weight, paddle.to_tensor(labels), vocab_first=True, bf16=True)

    found = outputs_and_gradients(rounded, arrays)
    for name, want in exact.items():
        difference = np.abs(found[name] - want).max() / np.abs(want).max()
        assert 1e-6 < difference < 2e-2, name  # rounded, and no more than that


def test_backward_holds_one_chunk_of_logits():
    """Nothing of the size of the logits is kept between forward and backward."""
    from paddle.base import core

    rows, vocab = 4096, 2048
    hidden = paddle.to_tensor(drawn(rows, 4), stop_gradient=False)
    weight, labels = paddle.to_tensor(drawn(vocab, 4)), paddle.to_tensor(labelled(rows, vocab, ignored=0.0))
    for op in (linear_log_probs, linear_log_probs_plain):
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        op(hidden, weight, labels, vocab_first=True).sum().backward()
        assert core.host_memory_stat_peak_value("Allocated", 0) - before < rows * vocab * 4 * 0.8
        hidden.clear_gradient()
