"""The head of a part of the vocabulary: beside its plain twin, and all parts together beside the whole."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.cross_entropy import IGNORED, linear_cross_entropy, token_scores
from erniekit.ops.vocabulary import (
    ELSEWHERE,
    slice_gradients,
    slice_gradients_plain,
    slice_scores,
    slice_scores_plain,
)
from tests.unit.ops.twins import assert_close, drawn

SIZES = [(1, 1, 2), (5, 7, 34), (1100, 16, 50)]


def labelled(m, v):
    rng = np.random.default_rng([m, v])
    labels = rng.integers(0, v, m)
    labels[rng.random(m) < 0.2] = IGNORED
    return labels


def part_of(labels, start, size):
    here = (labels >= start) & (labels < start + size)
    return np.where(labels == IGNORED, IGNORED, np.where(here, labels - start, ELSEWHERE))


def tensors(m, d, v, *, vocab_first):
    arrays = [drawn(m, d), drawn(*((v, d) if vocab_first else (d, v)), seed=1), drawn(v, seed=2)]
    return [paddle.to_tensor(array) for array in arrays]


def numbers(**found):
    return {name: None if x is None else x.numpy() for name, x in found.items()}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_twins(sizes, vocab_first, scaled):
    hidden, weight, bias = tensors(*sizes, vocab_first=vocab_first)
    labels = labelled(sizes[0], 3 * sizes[2])
    labels = paddle.to_tensor(np.where(labels >= sizes[2], ELSEWHERE, labels))
    how = {"vocab_first": vocab_first, "bias_V": bias}
    wanted = slice_scores_plain(hidden, weight, labels, **how)
    found = slice_scores(hidden, weight, labels, **how)
    assert_close(numbers(parts=found[0]), numbers(parts=wanted[0]))
    np.testing.assert_array_equal(found[1].numpy(), wanted[1].numpy())
    how |= {"log_sums_M": wanted[0][:, 0] + 0.7, "scales_M": paddle.to_tensor(drawn(sizes[0])) if scaled else None}
    for asked in ((True, True, True), (False, True, False), (True, False, True)):
        wanted = slice_gradients_plain(hidden, weight, labels, asked=asked, **how)
        found = slice_gradients(hidden, weight, labels, asked=asked, **how)
        names = ("hidden", "weight", "bias")
        assert_close(numbers(**dict(zip(names, found, strict=True))), numbers(**dict(zip(names, wanted, strict=True))))


@pytest.mark.parametrize("scores", [slice_scores, slice_scores_plain])
def test_parts_make_the_whole(scores):
    m, d, v = 40, 8, 30
    leaves = hidden, weight, bias = tensors(m, d, v, vocab_first=True)
    for leaf in leaves:
        leaf.stop_gradient = False
    labels = labelled(m, v)
    loss = linear_cross_entropy(hidden, weight, paddle.to_tensor(labels), vocab_first=True, bias_V=bias)
    loss.backward()
    pieces = [(slice(start, start + 10), paddle.to_tensor(part_of(labels, start, 10))) for start in (0, 10, 20)]
    cuts = [{"weight": weight[held].detach(), "labels_M": own, "bias_V": bias[held].detach()} for held, own in pieces]
    parts = paddle.stack([scores(hidden.detach(), vocab_first=True, **cut)[0] for cut in cuts])
    log_sums = paddle.logsumexp(parts[:, :, 0], axis=0)
    losses = (log_sums - parts[:, :, 1].sum(0)).numpy() * (labels != IGNORED)
    want = token_scores(hidden, weight, paddle.to_tensor(labels), vocab_first=True, bias_V=bias)[0].numpy()
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-6)
    made = [slice_gradients(hidden.detach(), vocab_first=True, log_sums_M=log_sums, **cut) for cut in cuts]
    found = [sum(grads[0] for grads in made), *(paddle.concat([grads[i] for grads in made]) for i in (1, 2))]
    names = ("hidden", "weight", "bias")
    whole = {name: leaf.grad.numpy() for name, leaf in zip(names, leaves, strict=True)}
    assert_close({name: x.numpy() for name, x in zip(names, found, strict=True)}, whole)


def test_no_tokens():
    hidden, weight, bias = tensors(0, 4, 6, vocab_first=True)
    none = paddle.zeros([0], "int64")
    for op in (slice_scores, slice_scores_plain):
        assert op(hidden, weight, none, vocab_first=True, bias_V=bias)[0].shape == [0, 3]
