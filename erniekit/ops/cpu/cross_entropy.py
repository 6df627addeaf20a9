"""PyLayer of the chunked cross-entropy kernel.

Shapes: M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle

from erniekit.ops.cpu.library import library
from erniekit.ops.gradients import only, wanted

CHUNK_TOKENS = 256


def cross_entropy(hidden_MD, weight, bias_V, labels_M, vocab_first: bool, grads: Sequence[paddle.Tensor | None]):
    """(loss [M], whether the label is the best token [M]); fills `grads` (of hidden, weight, bias) unless None."""
    losses_M, correct_M = paddle.empty(labels_M.shape, "float32"), paddle.empty(labels_M.shape, "bool")
    m, d = hidden_MD.shape
    vocab = weight.shape[0 if vocab_first else 1]
    inputs = (hidden_MD.contiguous(), weight.contiguous(), None if bias_V is None else bias_V.contiguous())
    labels_M = labels_M.astype("int64").contiguous()
    outputs = (losses_M, correct_M, *grads)
    wrong = library().call("cross_entropy", *inputs, labels_M, *outputs, m, d, vocab, vocab_first, CHUNK_TOKENS)
    if wrong >= 0:
        raise ValueError(f"label {int(labels_M[wrong])} of token {wrong} is outside the vocabulary of {vocab}")
    return losses_M, correct_M


class LinearCrossEntropy(paddle.autograd.PyLayer):
    """The sum of the losses; gradients are made in forward, while the logits are there."""

    @staticmethod
    def forward(ctx, hidden_MD, weight, bias_V, labels_M, vocab_first: bool, need_grad: bool):
        ctx.has_bias = bias_V is not None
        ctx.wanted = [need_grad and want for want in wanted(hidden_MD, weight, bias_V)]
        inputs = (hidden_MD, weight, weight[0] if bias_V is None else bias_V)
        grads = only(ctx.wanted, [paddle.empty(x.shape, "float32") for x in inputs])
        losses_M, _ = cross_entropy(hidden_MD, weight, bias_V, labels_M, vocab_first, grads)
        ctx.save_for_backward(*(x for x in grads if x is not None))
        return losses_M.sum()

    @staticmethod
    def backward(ctx, grad_total):
        made = iter(ctx.saved_tensor())
        grads = [next(made) * grad_total if want else None for want in ctx.wanted]
        return (*(grads if ctx.has_bias else grads[:2]), None)
