"""Cross-entropy of a linear head, and the log-probabilities of labels, on the chunked kernel (csrc/cross_entropy.cpp).

Shapes: M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle

from erniekit.ops.cpu.library import call
from erniekit.ops.gradients import wanted

CHUNK_TOKENS = 512

Gradients = Sequence[paddle.Tensor | None]  # of hidden, weight and bias


class _LinearCrossEntropy(paddle.autograd.PyLayer):
    """Makes the gradients in forward, while the logits are there."""

    @staticmethod
    def forward(ctx, hidden_MD, weight, bias_V, labels_M, vocab_first: bool, bf16: bool, need_grad: bool):
        ctx.wanted, ctx.has_bias = wanted(hidden_MD, weight, bias_V), bias_V is not None
        shapes = (hidden_MD.shape, weight.shape, bias_V.shape if ctx.has_bias else [0])
        asked = ctx.wanted if need_grad else [False] * 3
        grads = [paddle.empty(s, "float32") if want else None for s, want in zip(shapes, asked, strict=True)]
        losses_M, _ = _scores(hidden_MD, weight, bias_V, labels_M, vocab_first, bf16, grads)
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        return losses_M.sum()

    @staticmethod
    def backward(ctx, grad_total):
        made, factor = iter(ctx.saved_tensor()), float(grad_total)  # a number: Paddle multiplies by a tensor slowly
        grads = [next(made).scale(factor) if want else None for want in ctx.wanted]
        return (*(grads if ctx.has_bias else grads[:2]), None)


def _scores(
    hidden_MD, weight, bias_V, labels_M, vocab_first: bool, bf16: bool, grads: Gradients,
    scales_M: paddle.Tensor | None = None, *, log_sums_M: paddle.Tensor | None = None,
    parts_M3: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """(loss [M], whether the label is the best token [M]); fills the `grads` that are not None, of the sum of the
    losses (times their scales), and `parts_M3` (ops/vocabulary.py)."""
    vocab = weight.shape[0 if vocab_first else 1]
    labels_M = labels_M.astype("int64").contiguous()
    bias_V = None if bias_V is None else bias_V.contiguous()
    inputs = (hidden_MD.contiguous(), weight.contiguous(), bias_V, labels_M, scales_M, log_sums_M)
    outputs = (paddle.empty(labels_M.shape, "float32"), paddle.empty(labels_M.shape, "bool"))
    sizes = (*hidden_MD.shape, vocab, vocab_first, CHUNK_TOKENS, bf16)
    wrong = call("cross_entropy", *inputs, *outputs, parts_M3, *grads, *sizes)
    if wrong >= 0:
        raise ValueError(f"label {int(labels_M[wrong])} of token {wrong} is outside the vocabulary of {vocab}")
    return outputs


def linear_cross_entropy(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None, bf16: bool,
) -> paddle.Tensor:  # fmt: skip
    """Sum of -log softmax(head(hidden))[label] over the labels that are not ignored."""
    return _LinearCrossEntropy.apply(hidden_MD, weight, bias_V, labels_M, vocab_first, bf16, paddle.is_grad_enabled())


class _LinearLogProbs(paddle.autograd.PyLayer):
    """Makes the gradients in backward, from logits that are made again: every row has its own incoming gradient."""

    @staticmethod
    def forward(ctx, hidden_MD, weight, bias_V, labels_M, vocab_first: bool, bf16: bool):
        ctx.wanted, ctx.settings = wanted(hidden_MD, weight, bias_V), (vocab_first, bf16)
        ctx.save_for_backward(hidden_MD.contiguous(), weight, bias_V, labels_M)
        losses_M, _ = _scores(hidden_MD, weight, bias_V, labels_M, vocab_first, bf16, [None] * 3)
        return -losses_M

    @staticmethod
    def backward(ctx, grad_M):
        hidden_MD, weight, bias_V, labels_M = ctx.saved_tensor()
        inputs, (vocab_first, bf16) = (hidden_MD, weight, bias_V), ctx.settings
        grads = [paddle.empty_like(x) if want else None for x, want in zip(inputs, ctx.wanted, strict=True)]
        _scores(*inputs, labels_M, vocab_first, bf16, grads, (-grad_M).contiguous())
        return (*(grads if bias_V is not None else grads[:2]), None)


def linear_log_probs(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None, bf16: bool,
) -> paddle.Tensor:  # fmt: skip
    """log softmax(head(hidden))[label], [M]."""
    return _LinearLogProbs.apply(hidden_MD, weight, bias_V, labels_M, vocab_first, bf16)


def token_scores(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """(loss [M], whether the label is the best token [M]); ignored positions give 0 and False."""
    return _scores(hidden_MD, weight, bias_V, labels_M, vocab_first, False, [None] * 3)


def slice_scores(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None, bf16: bool,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """See ops/vocabulary.py."""
    parts_M3 = paddle.empty([*labels_M.shape, 3], "float32")
    _, correct_M = _scores(hidden_MD, weight, bias_V, labels_M, vocab_first, bf16, [None] * 3, parts_M3=parts_M3)
    return parts_M3, correct_M


def slice_gradients(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *, vocab_first: bool,
    bias_V: paddle.Tensor | None, bf16: bool, log_sums_M: paddle.Tensor, scales_M: paddle.Tensor | None,
    asked: Sequence[bool],
) -> Gradients:  # fmt: skip
    """See ops/vocabulary.py."""
    inputs = (hidden_MD, weight, bias_V)
    grads = [
        paddle.empty(x.shape, "float32") if want and x is not None else None
        for x, want in zip(inputs, asked, strict=True)
    ]
    scales_M = None if scales_M is None else scales_M.contiguous()
    _scores(*inputs, labels_M, vocab_first, bf16, grads, scales_M, log_sums_M=log_sums_M.contiguous())
    return grads
