"""Cross-entropy of a linear head over chunks of tokens; ignored tokens cost nothing (csrc/cross_entropy.cpp)."""

from __future__ import annotations

import numpy as np

from erniekit.ops.arrays.dense import Wanted
from erniekit.ops.arrays.product import matmul, rounded
from erniekit.ops.arrays.threads import column_sums, spread_rows

_IGNORED, _ELSEWHERE = -100, -101


def cross_entropy(
    hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, labels: np.ndarray,
    scales: np.ndarray | None, log_sums: np.ndarray | None, losses: np.ndarray, correct: np.ndarray,
    parts: np.ndarray | None, grad_hidden: Wanted, grad_weight: Wanted, grad_bias: Wanted, _tokens: int, _size: int,
    vocab: int, vocab_first: bool, chunk: int, bf16: bool,
) -> int:  # fmt: skip
    """Writes per-token losses and whether the label is the best token, and the gradients of the sum of scales *
    losses (None: all 1) where wanted.

    weight is [vocab, size] if vocab_first, else [size, vocab]. Returns the index of a label that is no token, or -1.
    `log_sums` and `parts` are about a part of the vocabulary: see csrc.
    """
    trained = np.flatnonzero(labels != _IGNORED)
    wrong = (labels[trained] < 0) | (labels[trained] >= vocab)
    if parts is not None or log_sums is not None:
        wrong &= labels[trained] != _ELSEWHERE
    if wrong.any():
        return int(trained[wrong.argmax()])
    for array in (losses, correct, parts, grad_hidden, grad_weight, grad_bias):
        if array is not None:
            array[:] = 0
    weight = rounded(weight, bf16)
    head = weight.T if vocab_first else weight
    room = np.empty([min(chunk, len(trained)), vocab], np.float32)
    for start in range(0, len(trained), chunk):
        token = trained[start : start + chunk]
        x, logits = rounded(hidden[token], bf16), room[: len(token)]
        matmul(x, head, logits)
        whole = None if log_sums is None else log_sums[token]
        found, correct[token] = _softmax(logits, bias, labels[token], whole)
        losses[token] = found[:, 0] - found[:, 1]
        if parts is not None:
            parts[token] = found
        if scales is not None:
            logits *= scales[token][:, None]
        if grad_bias is not None:
            grad_bias += column_sums(logits)
        if grad_weight is None and grad_hidden is None:
            continue
        grad = rounded(logits, bf16)
        if grad_weight is not None:
            left, right = (grad, x) if vocab_first else (x, grad)
            matmul(left.T, right, grad_weight, add=True)
        if grad_hidden is not None:
            made = np.empty([len(token), hidden.shape[1]], np.float32)
            matmul(grad, head.T, made)
            grad_hidden[token] = made
    return -1


def _softmax(
    logits: np.ndarray, bias: np.ndarray | None, labels: np.ndarray, log_sums: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(log(sum exp), the label's logit and the greatest one, [rows, 3]; whether the label is the first of the best);
    logits become the loss's gradients."""
    found, correct = np.empty([len(labels), 3], np.float32), np.empty(len(labels), bool)

    def work(block: slice) -> None:
        rows, label = logits[block], labels[block]
        number = np.flatnonzero(label != _ELSEWHERE)
        here = number, label[number]
        if bias is not None:
            rows += bias
        top, picked = np.maximum.reduce(rows, axis=1), np.zeros(len(label), np.float32)
        picked[number] = rows[here]
        correct[block] = (picked == top) & (label != _ELSEWHERE)
        for row in np.flatnonzero(correct[block]):
            correct[block.start + row] = rows[row].argmax() == label[row]
        rows -= top[:, None]
        np.exp(rows, out=rows)
        total = np.add.reduce(rows, axis=1)
        log_sum = top + np.log(total)
        found[block] = np.stack([log_sum, picked, top], 1)
        factor = np.float32(1.0) / total
        if log_sums is not None:
            factor *= np.exp(log_sum - log_sums[block])
        rows *= factor[:, None]
        rows[here] -= np.float32(1.0)

    spread_rows(len(logits), logits.shape[1], work)
    return found, correct
