"""Loss, perplexity and token accuracy over an eval set."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import paddle

from erniekit.base.errors import DataError
from erniekit.data.batch import Batch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.attention import end_rows_from_segments
from erniekit.ops.cross_entropy import token_scores


@paddle.no_grad()
def evaluate(model: ErnieForCausalLM, batches: Iterable[Batch], *, max_batches: int = -1) -> dict[str, float]:
    """eval_loss (mean over trained tokens), eval_perplexity, eval_accuracy, eval_tokens.

    A positive `max_batches` stops early. Raises DataError if no position has a label.
    """
    was_training = model.training
    model.eval()
    loss, correct, trained = 0.0, 0, 0
    weight, bias, vocab_first = model.head()
    for count, batch in enumerate(batches):
        if 0 < max_batches <= count:
            break
        segments = paddle.to_tensor(batch.segment_ids)
        trunk = model.trunk(
            paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.position_ids), end_rows_from_segments(segments)
        )
        losses, corrects = token_scores(
            trunk.hidden_BSD.reshape([-1, trunk.hidden_BSD.shape[-1]]), weight,
            paddle.to_tensor(batch.labels).reshape([-1]), vocab_first=vocab_first, bias_V=bias,
        )  # fmt: skip
        loss += float(losses.astype("float64").sum())
        correct += int(corrects.astype("int64").sum())
        trained += int(np.count_nonzero(batch.labels != -100))
    if was_training:
        model.train()
    if not trained:
        raise DataError("the eval set has no token to predict: every label is masked or it is empty.")
    mean = loss / trained
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),
        "eval_accuracy": correct / trained,
        "eval_tokens": trained,
    }
