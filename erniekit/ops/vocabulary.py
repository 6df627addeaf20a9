"""A linear head that has a part of the vocabulary: what its tokens contribute to a softmax over all of them.

First every part scores its tokens (`slice_scores`); from the log-sums of all parts follows that of the vocabulary;
with it, every part makes the gradients of the whole loss for its tokens (`slice_gradients`), the logits once more.
Who adds up the parts is not known here. Labels count within the part; those of tokens in other parts are ELSEWHERE.
Shapes: M tokens, D hidden size, V vocabulary of the part.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import cross_entropy as cpu
from erniekit.ops.cross_entropy import CHUNK_TOKENS, IGNORED, head_logits
from erniekit.ops.dispatch import backend

ELSEWHERE = -101


def _chunks(labels_M: paddle.Tensor) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, labels_M.shape[0], CHUNK_TOKENS)]


def slice_scores_plain(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """The plain twin of `slice_scores`."""
    parts, corrects = [], []
    for rows in _chunks(labels_M):
        labels = labels_M[rows]
        logits = head_logits(hidden_MD[rows], weight, vocab_first=vocab_first, bias_V=bias_V)
        here = labels >= 0
        target = paddle.where(here, labels, paddle.zeros_like(labels))
        picked = paddle.take_along_axis(logits, target.unsqueeze(-1), 1).squeeze(-1) * here.astype("float32")
        found = paddle.stack([paddle.logsumexp(logits, axis=-1), picked, logits.max(-1)], 1)
        parts.append(found * (labels != IGNORED).astype("float32").unsqueeze(-1))
        corrects.append((logits.argmax(-1) == target) & here)
    if not parts:
        return paddle.zeros([0, 3], "float32"), paddle.zeros([0], "bool")
    return paddle.concat(parts), paddle.concat(corrects)


def slice_gradients_plain(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *, vocab_first: bool,
    bias_V: paddle.Tensor | None = None, log_sums_M: paddle.Tensor, scales_M: paddle.Tensor | None = None,
    asked: Sequence[bool] = (True, True, True),
) -> list[paddle.Tensor | None]:  # fmt: skip
    """The plain twin of `slice_gradients`."""
    for_hidden, for_weight, for_bias = asked
    made = []
    grad_weight = paddle.zeros_like(weight) if for_weight else None
    grad_bias = paddle.zeros_like(bias_V) if for_bias and bias_V is not None else None
    for rows in _chunks(labels_M):
        labels, hidden = labels_M[rows], hidden_MD[rows]
        logits = head_logits(hidden, weight, vocab_first=vocab_first, bias_V=bias_V)
        here = (labels >= 0).astype("float32").unsqueeze(-1)
        target = paddle.where(labels >= 0, labels, paddle.zeros_like(labels))
        grad = paddle.exp(logits - log_sums_M[rows].unsqueeze(-1)) - F.one_hot(target, logits.shape[-1]) * here
        factor = (labels != IGNORED).astype("float32")
        factor = factor if scales_M is None else factor * scales_M[rows]
        grad = (grad * factor.unsqueeze(-1)).astype(weight.dtype)
        if for_hidden:
            made.append(paddle.matmul(grad, weight, transpose_y=not vocab_first))
        if grad_weight is not None:
            left, right = (grad, hidden) if vocab_first else (hidden, grad)
            grad_weight += paddle.matmul(left, right, transpose_x=True)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
    grad_hidden = paddle.concat(made) if made else paddle.zeros_like(hidden_MD)
    return [grad_hidden if for_hidden else None, grad_weight, grad_bias]


@paddle.no_grad()
def slice_scores(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *,
    vocab_first: bool, bias_V: paddle.Tensor | None = None, bf16: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor]:  # fmt: skip
    """(log(sum exp), the label's logit or 0, the greatest logit [M, 3] fp32; whether the label is the first of the best
    in this part [M]). Ignored tokens give zeros and False."""
    if backend(hidden_MD, weight) == "cpu":
        return cpu.slice_scores(hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V, bf16=bf16)
    return slice_scores_plain(hidden_MD, weight, labels_M, vocab_first=vocab_first, bias_V=bias_V)


@paddle.no_grad()
def slice_gradients(
    hidden_MD: paddle.Tensor, weight: paddle.Tensor, labels_M: paddle.Tensor, *, vocab_first: bool,
    bias_V: paddle.Tensor | None = None, log_sums_M: paddle.Tensor, scales_M: paddle.Tensor | None = None,
    asked: Sequence[bool] = (True, True, True), bf16: bool = False,
) -> Sequence[paddle.Tensor | None]:  # fmt: skip
    """Gradients of sum(scales * losses) for hidden, weight and bias, as far as `asked`; that of hidden is this part's
    contribution. `log_sums_M` are over the whole vocabulary."""
    common = {"vocab_first": vocab_first, "bias_V": bias_V, "log_sums_M": log_sums_M, "scales_M": scales_M}
    if backend(hidden_MD, weight) == "cpu":
        return cpu.slice_gradients(hidden_MD, weight, labels_M, asked=asked, bf16=bf16, **common)
    return slice_gradients_plain(hidden_MD, weight, labels_M, asked=asked, **common)
