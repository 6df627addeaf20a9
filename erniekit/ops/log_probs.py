"""Log-probabilities of labels under a linear head, one per row, in chunks of rows: no [M, V] tensor ever lives.

The gradient of ops/cross_entropy.py is made in forward and scaled afterwards. Here every row has an incoming gradient
of its own, known in backward only: the logits are made a second time there, one chunk at a time. A frozen head costs no
weight gradient. Shapes: M labelled rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import cross_entropy as cpu
from erniekit.ops.cross_entropy import CHUNK_TOKENS, head_logits
from erniekit.ops.dispatch import backend
from erniekit.ops.gradients import wanted


class _LinearLogProbs(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, hidden_MD, weight, bias_V, labels_M, vocab_first: bool):
        ctx.vocab_first, ctx.wanted = vocab_first, wanted(hidden_MD, weight, bias_V)
        ctx.save_for_backward(hidden_MD, weight, bias_V, labels_M)
        picked = []
        for rows in _chunks(hidden_MD.shape[0]):
            logits = head_logits(hidden_MD[rows], weight, vocab_first=vocab_first, bias_V=bias_V)
            at_label = paddle.take_along_axis(logits, labels_M[rows].unsqueeze(-1), 1).squeeze(-1)
            picked.append(at_label - paddle.logsumexp(logits, axis=-1))
        return paddle.concat(picked) if picked else paddle.zeros([0], "float32")

    @staticmethod
    def backward(ctx, grad_M):
        hidden_MD, weight, bias_V, labels_M = ctx.saved_tensor()
        for_hidden, for_weight, for_bias = ctx.wanted
        grad_hidden = []
        grad_weight = paddle.zeros_like(weight) if for_weight else None
        grad_bias = paddle.zeros_like(bias_V) if for_bias else None
        for rows in _chunks(hidden_MD.shape[0]):
            hidden = hidden_MD[rows]
            logits = head_logits(hidden, weight, vocab_first=ctx.vocab_first, bias_V=bias_V)
            grad = F.one_hot(labels_M[rows], logits.shape[-1]) - F.softmax(logits, axis=-1)
            grad = (grad * grad_M[rows].unsqueeze(-1)).astype(weight.dtype)
            if for_hidden:
                grad_hidden.append(paddle.matmul(grad, weight, transpose_y=not ctx.vocab_first))
            if for_weight:
                left, right = (grad, hidden) if ctx.vocab_first else (hidden, grad)
                grad_weight += paddle.matmul(left, right, transpose_x=True)
            if for_bias:
                grad_bias += grad.sum(0)
        made = paddle.concat(grad_hidden) if grad_hidden else None
        return (made, grad_weight, *([] if bias_V is None else [grad_bias]), None)


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, num_rows, CHUNK_TOKENS)]


def linear_log_probs_plain(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None,
) -> paddle.Tensor:  # fmt: skip
    """The plain twin of `linear_log_probs`."""
    return _LinearLogProbs.apply(hidden_MD, weight, bias_V, labels_M, vocab_first)


def linear_log_probs(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None, bf16: bool = False,
) -> paddle.Tensor:  # fmt: skip
    """log softmax(head(hidden))[label], fp32 [M]. Every row must have a label: give only the rows that are wanted."""
    if backend(hidden_MD, weight) == "cpu":
        return cpu.linear_log_probs(hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V, bf16=bf16)
    return linear_log_probs_plain(hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V)
