"""Cross-entropy of the linear head beside its plain twin."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_cross_entropy_plain,
    token_scores,
    token_scores_plain,
)
from tests.unit.ops.twins import assert_twins, drawn

# tokens, hidden size, vocabulary: more tokens than one chunk, and odd sizes
SIZES = [(1, 1, 2), (5, 7, 33), (1100, 16, 50)]


def labelled(m, v, *, ignored=0.3):
    rng = np.random.default_rng([m, v])
    labels = rng.integers(0, v, m)
    labels[rng.random(m) < ignored] = IGNORED
    return labels


def arrays_of(m, d, v, *, vocab_first, bias):
    weight = drawn(*((v, d) if vocab_first else (d, v)), seed=1)
    return {"hidden": drawn(m, d), "weight": weight} | ({"bias": drawn(v, seed=2)} if bias else {})


def pair(labels, *, vocab_first):
    def of(op):
        return lambda hidden, weight, bias=None: op(
            hidden, weight, paddle.to_tensor(labels), vocab_first=vocab_first, bias_V=bias
        )

    return of(linear_cross_entropy), of(linear_cross_entropy_plain)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_loss(sizes, vocab_first, bias):
    labels = labelled(sizes[0], sizes[2])
    assert_twins(*pair(labels, vocab_first=vocab_first), arrays_of(*sizes, vocab_first=vocab_first, bias=bias))


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_frozen_inputs_get_no_gradient(frozen):
    arrays = arrays_of(9, 6, 11, vocab_first=True, bias=True)
    assert_twins(*pair(labelled(9, 11), vocab_first=True), arrays, frozen=frozen)


def test_all_labels_ignored():
    labels = np.full(7, IGNORED)
    assert_twins(*pair(labels, vocab_first=True), arrays_of(7, 4, 5, vocab_first=True, bias=True))


def test_extreme_logits_stay_finite():
    hidden, weight = paddle.to_tensor(1e4 * drawn(6, 4)), paddle.to_tensor(drawn(9, 4, seed=1))
    labels = paddle.to_tensor(labelled(6, 9, ignored=0.0))
    found = linear_cross_entropy(hidden, weight, labels, vocab_first=True)
    want = linear_cross_entropy_plain(hidden, weight, labels, vocab_first=True)
    np.testing.assert_allclose(float(found), float(want), rtol=1e-5)


def test_nan_stays_visible():
    hidden = drawn(4, 3)
    hidden[2, 1] = np.nan
    labels, weight = paddle.to_tensor(labelled(4, 5, ignored=0.0)), paddle.to_tensor(drawn(5, 3))
    assert np.isnan(float(linear_cross_entropy(paddle.to_tensor(hidden), weight, labels, vocab_first=True)))


def test_no_gradient_is_made_without_need():
    hidden, weight = paddle.to_tensor(drawn(4, 3)), paddle.to_tensor(drawn(5, 3))
    weight.stop_gradient = False
    with paddle.no_grad():
        assert linear_cross_entropy(hidden, weight, paddle.to_tensor(labelled(4, 5)), vocab_first=True).stop_gradient


@pytest.mark.parametrize("wrong", [11, -1, -101])
def test_a_label_outside_the_vocabulary_is_named(wrong):
    labels = labelled(6, 11)
    labels[4] = wrong
    with pytest.raises(ValueError, match=rf"label {wrong} of token 4 .* 11"):
        linear_cross_entropy(
            paddle.to_tensor(drawn(6, 3)), paddle.to_tensor(drawn(11, 3)), paddle.to_tensor(labels), vocab_first=True
        )


@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_token_scores(sizes, vocab_first):
    arrays = arrays_of(*sizes, vocab_first=vocab_first, bias=True)
    hidden, weight, bias = map(paddle.to_tensor, arrays.values())
    labels = paddle.to_tensor(labelled(sizes[0], sizes[2]))
    found = token_scores(hidden, weight, labels, vocab_first=vocab_first, bias_V=bias)
    want = token_scores_plain(hidden, weight, labels, vocab_first=vocab_first, bias_V=bias)
    np.testing.assert_allclose(found[0].numpy(), want[0].numpy(), rtol=1e-5, atol=1e-5)
    assert found[1].numpy().tolist() == want[1].numpy().tolist()
    assert found[1].dtype == want[1].dtype == paddle.bool


def test_the_first_of_equal_logits_is_the_best():
    hidden, weight = paddle.ones([3, 2]), paddle.ones([4, 2])
    correct = token_scores(hidden, weight, paddle.to_tensor([0, 1, 3]), vocab_first=True)[1]
    assert correct.numpy().tolist() == [True, False, False]
