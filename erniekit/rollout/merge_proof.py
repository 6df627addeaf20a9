"""Whether a merged model says what base and adapter say: the same token rows through both, logit by logit.

A merge in fp32 differs by rounding in the order of sums. One that is rounded to bfloat16 differs by half a unit in the
last of 8 bits in every weight; beside that difference stands how far the adapter itself moved the base, so that one
sees what of it the rounding keeps. Loads one model at a time, and knows no data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import paddle

from erniekit.base.errors import CheckpointError
from erniekit.models.decoder import ErnieForCausalLM

# Mean KL per token that is allowed, by the format that was written. Measured with nine small models, adapters on every
# linear layer: fp32 up to 1.5e-12, bfloat16 up to 9e-6. A merge that left out one projection of one layer made 2e-7 to
# 6e-2. fp32 has room for a routed token that changes its expert by rounding; bfloat16 for models whose predictions are
# sharper than those of random weights.
TOLERANCES = {"float32": 1e-7, "bfloat16": 2e-3}
MAX_ROWS, MAX_TOKENS = 8, 128
TEXTS = (
    "The river was high that spring, and the old bridge stood a hand's breadth above the water. Nobody crossed it.",
    "To add two fractions, bring them to a common denominator first: 1/2 + 1/3 = 3/6 + 2/6 = 5/6.",
    "def mean(values):\n    total = 0.0\n    for v in values:\n        total += v\n    return total / len(values)\n",
    "春天来了，河水涨了起来。老桥离水面只有一掌高，没有人敢过去。",
    "User: 请用一句话介绍北京。\nAssistant: 北京是中国的首都，有三千多年的建城史。",
    "User: What is the capital of France?\nAssistant: Paris.",
)


@dataclass(frozen=True)
class Difference:
    """How far two models are apart over some tokens: of the logits, and of the distributions that they stand for
    (Kullback-Leibler, in nats per token)."""

    tokens: int
    max_logit: float
    mean_kl: float
    max_kl: float

    def __str__(self) -> str:
        return f"max |difference of logits| {self.max_logit:.2e}, KL {self.mean_kl:.2e} (at most {self.max_kl:.2e})"

    def facts(self) -> dict[str, float]:
        """For a file."""
        return asdict(self)


def token_rows(rows: Iterable[Sequence[int]]) -> list[np.ndarray]:
    """The first rows of at least two tokens, cut to a length that is compared quickly."""
    cut = (np.asarray(row[:MAX_TOKENS], np.int64) for row in rows)
    picked: list[np.ndarray] = []
    for row in cut:
        if len(picked) < MAX_ROWS and len(row) > 1:
            picked.append(row)
    return picked


@paddle.no_grad()
def logits_of(model: ErnieForCausalLM, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """fp32 logits [tokens, vocabulary] of each row."""
    return [model(paddle.to_tensor(row[None, :]))[0].numpy() for row in rows]


def difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Difference:
    """How far `found` is from `expected`."""
    largest = max(float(np.abs(one - other).max()) for one, other in zip(expected, found, strict=True))
    kl = np.concatenate([_kl(one, other) for one, other in zip(expected, found, strict=True)])
    return Difference(len(kl), largest, float(kl.mean()), float(kl.max()))


def require_close(found: Difference, *, tolerance: float, dtype: str) -> None:
    """Raise CheckpointError if a merged model is too far from base and adapter; NaN is far, too."""
    if not found.mean_kl <= tolerance:
        raise CheckpointError(
            f"The merged model is not what base and adapter are: {found}, over {found.tokens} tokens; KL up to "
            f"{tolerance:g} is allowed for {dtype} (merge_tolerance). Nothing was written."
        )


def _kl(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = _log_softmax(one), _log_softmax(other)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
