"""Cross-entropy of a linear head, in chunks of tokens: the logits of a whole batch are never held.

The gradient of a chunk's logits is made in the forward pass, while they are there, and scaled by the incoming gradient
in backward. Shapes: M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import cross_entropy as cpu
from erniekit.ops.dispatch import backend
from erniekit.ops.gradients import only, wanted

CHUNK_TOKENS = 512
IGNORED = -100


class _LinearCrossEntropy(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, hidden_MD, weight, bias_V, labels_M, vocab_first: bool, need_grad: bool):
        total = paddle.zeros([], "float32")
        ctx.has_bias = bias_V is not None
        grad_hidden, grad_weight = [], paddle.zeros_like(weight) if need_grad else None
        grad_bias = paddle.zeros_like(bias_V) if need_grad and ctx.has_bias else None
        for start in range(0, hidden_MD.shape[0], CHUNK_TOKENS):
            hidden, labels = hidden_MD[start : start + CHUNK_TOKENS], labels_M[start : start + CHUNK_TOKENS]
            trained = (labels != IGNORED).astype("float32")
            logits = head_logits(hidden, weight, vocab_first=vocab_first, bias_V=bias_V)
            target = paddle.where(labels == IGNORED, paddle.zeros_like(labels), labels)
            log_sum = paddle.logsumexp(logits, axis=-1)
            picked = paddle.take_along_axis(logits, target.unsqueeze(-1), 1).squeeze(-1)
            total = total + ((log_sum - picked) * trained).sum()
            if not need_grad:
                continue
            grad = paddle.exp(logits - log_sum.unsqueeze(-1)) - F.one_hot(target, logits.shape[-1])
            grad = (grad * trained.unsqueeze(-1)).astype(weight.dtype)
            grad_hidden.append(paddle.matmul(grad, weight, transpose_y=not vocab_first))
            left, right = (grad, hidden) if vocab_first else (hidden, grad)
            grad_weight += paddle.matmul(left, right, transpose_x=True)
            if ctx.has_bias:
                grad_bias += grad.sum(0)
        ctx.wanted = wanted(hidden_MD, weight, *([bias_V] if ctx.has_bias else []), labels_M)
        if need_grad:
            ctx.save_for_backward(paddle.concat(grad_hidden), grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grads = [x * grad_total.astype(x.dtype) for x in ctx.saved_tensor() if x is not None]
        return only(ctx.wanted, (*grads, None))


def head_logits(
    hidden: paddle.Tensor, weight: paddle.Tensor, *, vocab_first: bool, bias_V: paddle.Tensor | None = None
) -> paddle.Tensor:
    """fp32 logits of `hidden` [..., D]; weight is [V, D] if `vocab_first` (a tied embedding), else [D, V]."""
    logits = paddle.matmul(hidden, weight, transpose_y=vocab_first).astype("float32")
    return logits if bias_V is None else logits + bias_V.astype("float32")


def linear_cross_entropy_plain(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None,
) -> paddle.Tensor:  # fmt: skip
    """The plain twin of `linear_cross_entropy`."""
    need_grad = paddle.is_grad_enabled() and any(wanted(hidden_MD, weight, bias_V))
    return _LinearCrossEntropy.apply(hidden_MD, weight, bias_V, labels_M, vocab_first, need_grad)


def linear_cross_entropy(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None, bf16: bool = False,
) -> paddle.Tensor:  # fmt: skip
    """Sum of -log softmax(head(hidden))[label] over the labels that are not IGNORED: an fp32 scalar."""
    if backend(hidden_MD, weight) == "cpu":
        return cpu.linear_cross_entropy(
            hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V, bf16=bf16
        )  # fmt: skip
    return linear_cross_entropy_plain(hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V)


@paddle.no_grad()
def token_scores_plain(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """The plain twin of `token_scores`."""
    losses, corrects = [], []
    for start in range(0, hidden_MD.shape[0], CHUNK_TOKENS):
        labels = labels_M[start : start + CHUNK_TOKENS]
        logits = head_logits(hidden_MD[start : start + CHUNK_TOKENS], weight, vocab_first=vocab_first, bias_V=bias_V)
        trained = labels != IGNORED
        target = paddle.where(trained, labels, paddle.zeros_like(labels))
        picked = paddle.take_along_axis(logits, target.unsqueeze(-1), 1).squeeze(-1)
        losses.append((paddle.logsumexp(logits, axis=-1) - picked) * trained.astype("float32"))
        corrects.append((logits.argmax(-1) == target) & trained)
    return paddle.concat(losses), paddle.concat(corrects)


@paddle.no_grad()
def token_scores(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """For evaluation: (loss [M] fp32, correct [M] bool) per token; ignored positions give 0 and False."""
    chosen = cpu.token_scores if backend(hidden_MD, weight) == "cpu" else token_scores_plain
    return chosen(hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V)
