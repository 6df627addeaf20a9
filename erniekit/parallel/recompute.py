"""Recomputation from outside: the forward of whole layers, of attention or of its core runs again in the backward pass.

Parameter names and results do not change; only the memory does.
"""

from __future__ import annotations

import logging

from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddle.distributed.fleet.utils.log_util import logger

from erniekit.models.attention import Attention, CoreAttention
from erniekit.models.decoder import DecoderLayer, ErnieForCausalLM

_WHAT: dict[str, type[nn.Layer]] = {"full": DecoderLayer, "full_attn": Attention, "core_attn": CoreAttention}
GRANULARITIES = tuple(_WHAT)


def apply_recompute(model: ErnieForCausalLM, granularity: str) -> None:
    """Recompute every layer of the kind that `granularity` names ("full", "full_attn" or "core_attn").

    Non-reentrant: inputs without a gradient, keyword arguments and tuples of outputs are all right, and frozen
    embeddings do not silence the layers above them.
    """
    logger.addFilter(_is_true)
    for layer in model.sublayers():
        if isinstance(layer, _WHAT[granularity]):
            _recompute_in_training(layer)


def _is_true(record: logging.LogRecord) -> bool:
    """Not what Paddle says in every step over a frozen embedding: that a layer whose input has no gradient need not be
    computed again. That holds for its reentrant way, not for this one."""
    return "None of the inputs to current recompute block need grad" not in record.getMessage()


def _recompute_in_training(layer: nn.Layer) -> None:
    plain = layer.forward

    def forward(*args, **kwargs):  # the layer's own signature
        if not layer.training:
            return plain(*args, **kwargs)
        return recompute(plain, *args, use_reentrant=False, **kwargs)

    layer.forward = forward
