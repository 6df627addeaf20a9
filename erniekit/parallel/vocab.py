"""The vocabulary in parts: embedding, logits, cross-entropy, log-probabilities and scores of tokens, each rank with its
own tokens. Nobody ever has the logits of the whole vocabulary, but for the last position in generation.

Shapes: B batch, S positions, M tokens, D hidden size, V vocabulary of a part.
"""

from __future__ import annotations

import functools
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from erniekit.models.decoder import HeadKernels
from erniekit.ops.cross_entropy import IGNORED, head_logits
from erniekit.ops.gradients import wanted
from erniekit.ops.vocabulary import ELSEWHERE, slice_gradients, slice_scores
from erniekit.parallel.collectives import Axis
from erniekit.parallel.passing import copy_in, join


def partial_embedding(ids: Tensor, weight_VD: Tensor, *, axis: Axis) -> Tensor:
    """Rows of this rank's tokens; zeros for the others', so that the ranks' results add up to the embedding."""
    local = ids - axis.index * weight_VD.shape[0]
    here = (local >= 0).logical_and(local < weight_VD.shape[0])
    rows = F.embedding(paddle.where(here, local, paddle.zeros_like(local)), weight_VD)
    return rows * here.astype(rows.dtype).unsqueeze(-1)


def head_kernels(axis: Axis) -> HeadKernels:
    """What takes the place of the kernels of models/decoder.py on the ranks of `axis`. Hidden states and labels are
    alike on all of them, and so are results."""
    return HeadKernels(
        loss_sum=functools.partial(_loss_sum, axis=axis), log_probs=functools.partial(_log_probs, axis=axis),
        token_scores=functools.partial(_token_scores, axis=axis), logits=functools.partial(_logits, axis=axis),
    )  # fmt: skip


def _local_labels(labels_M: Tensor, weight: Tensor, axis: Axis, *, vocab_first: bool) -> Tensor:
    """Labels as this rank counts its tokens; ELSEWHERE for the others'."""
    labels_M, num_tokens = labels_M.astype("int64"), weight.shape[0 if vocab_first else 1]
    total = num_tokens * axis.size
    wrong = (labels_M != IGNORED).logical_and((labels_M < 0).logical_or(labels_M >= total))
    if bool(wrong.any()):
        token = int(wrong.astype("int64").argmax())
        raise ValueError(f"label {int(labels_M[token])} of token {token} is outside the vocabulary of {total}")
    local = labels_M - axis.index * num_tokens
    here = (local >= 0).logical_and(local < num_tokens)
    local = paddle.where(here, local, paddle.full_like(local, ELSEWHERE))
    return paddle.where(labels_M == IGNORED, labels_M, local)


def _scored(
    hidden_MD: Tensor, weight: Tensor, labels_M: Tensor, axis: Axis, how: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sums over all parts [M], losses [M], every rank's `parts` [ranks, M, 3], `correct` in this part)."""
    parts_M3, correct_M = slice_scores(hidden_MD, weight, labels_M, **how)
    found = axis.all_gather(parts_M3.unsqueeze(0))
    log_sums_M = paddle.logsumexp(found[:, :, 0], axis=0)
    trained = (labels_M != IGNORED).astype("float32")
    return log_sums_M, (log_sums_M - found[:, :, 1].sum(0)) * trained, found, correct_M


class _LossSum(PyLayer):
    """Makes the gradients in forward, as ops/cross_entropy.py does."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight: Tensor, bias_V: Tensor | None, labels_M: Tensor, axis: Axis,
        how: dict[str, Any], need_grad: bool,  # noqa: FBT001 - a PyLayer takes no keywords
    ) -> Tensor:  # fmt: skip
        ctx.wanted, ctx.has_bias = wanted(hidden_MD, weight, bias_V), bias_V is not None
        how = how | {"bias_V": bias_V}
        log_sums_M, losses_M, _, _ = _scored(hidden_MD, weight, labels_M, axis, how)
        if need_grad and any(ctx.wanted):
            grads = slice_gradients(hidden_MD, weight, labels_M, log_sums_M=log_sums_M, asked=ctx.wanted, **how)
            ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        return losses_M.sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        made, factor = iter(ctx.saved_tensor()), float(grad_total)
        grads = [next(made).scale(factor) if want else None for want in ctx.wanted]
        return (*(grads if ctx.has_bias else grads[:2]), None)


class _LogProbs(PyLayer):
    """Makes the gradients in backward, as ops/log_probs.py does."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight: Tensor, bias_V: Tensor | None, labels_M: Tensor, axis: Axis,
        how: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        ctx.wanted, ctx.how = wanted(hidden_MD, weight, bias_V), how
        log_sums_M, losses_M, _, _ = _scored(hidden_MD, weight, labels_M, axis, how | {"bias_V": bias_V})
        ctx.save_for_backward(hidden_MD, weight, bias_V, labels_M, log_sums_M)
        return -losses_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight, bias_V, labels_M, log_sums_M = ctx.saved_tensor()
        grads = slice_gradients(
            hidden_MD, weight, labels_M, bias_V=bias_V, log_sums_M=log_sums_M, scales_M=-grad_M, asked=ctx.wanted,
            **ctx.how,
        )  # fmt: skip
        return (*(grads if bias_V is not None else grads[:2]), None)


def _loss_sum(
    hidden_MD: Tensor, weight: Tensor, labels_M: Tensor, *,
    vocab_first: bool, bias_V: Tensor | None = None, bf16: bool = False, axis: Axis,
) -> Tensor:  # fmt: skip
    how = {"vocab_first": vocab_first, "bf16": bf16}
    local_M = _local_labels(labels_M, weight, axis, vocab_first=vocab_first)
    return _LossSum.apply(copy_in(hidden_MD, axis), weight, bias_V, local_M, axis, how, paddle.is_grad_enabled())


def _log_probs(
    hidden_MD: Tensor, weight: Tensor, labels_M: Tensor, *,
    vocab_first: bool, bias_V: Tensor | None = None, bf16: bool = False, axis: Axis,
) -> Tensor:  # fmt: skip
    how = {"vocab_first": vocab_first, "bf16": bf16}
    local_M = _local_labels(labels_M, weight, axis, vocab_first=vocab_first)
    return _LogProbs.apply(copy_in(hidden_MD, axis), weight, bias_V, local_M, axis, how)


@paddle.no_grad()
def _token_scores(
    hidden_MD: Tensor, weight: Tensor, labels_M: Tensor, *,
    vocab_first: bool, bias_V: Tensor | None = None, axis: Axis,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    local_M = _local_labels(labels_M, weight, axis, vocab_first=vocab_first)
    how = {"vocab_first": vocab_first, "bias_V": bias_V}
    _, losses_M, found, correct_M = _scored(hidden_MD, weight, local_M, axis, how)
    # The first of the best: better than all before, no worse than all behind.
    mine, tops = found[axis.index, :, 2], found[:, :, 2]
    before, behind = tops[: axis.index], tops[axis.index + 1 :]
    best = (before < mine).all(0).logical_and((behind <= mine).all(0))
    correct = axis.all_reduce(correct_M.logical_and(best).astype("float32"))
    return losses_M, correct > 0


def _logits(
    hidden: Tensor, weight: Tensor, *, vocab_first: bool, bias_V: Tensor | None = None, axis: Axis
) -> Tensor:
    mine = head_logits(copy_in(hidden, axis), weight, vocab_first=vocab_first, bias_V=bias_V)
    return join(mine, axis, dim=mine.ndim - 1, total=mine.shape[-1] * axis.size)
