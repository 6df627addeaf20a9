"""Recomputation from outside: the forward of whole layers, of attention or of its core runs again in the backward pass.

Parameter names and results do not change; only the memory does.
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from erniekit.models.attention import Attention, CoreAttention
from erniekit.models.decoder import DecoderLayer, ErnieForCausalLM

_WHAT: dict[str, type[nn.Layer]] = {"full": DecoderLayer, "full_attn": Attention, "core_attn": CoreAttention}
GRANULARITIES = tuple(_WHAT)


def apply_recompute(model: ErnieForCausalLM, granularity: str) -> None:
    """Recompute every layer of the kind that `granularity` names ("full", "full_attn" or "core_attn").

    Non-reentrant: inputs without a gradient, keyword arguments and tuples of outputs are all right, and frozen
    embeddings do not silence the layers above them.
    """
    for layer in model.sublayers():
        if isinstance(layer, _WHAT[granularity]):
            _recompute_in_training(layer)


def _recompute_in_training(layer: nn.Layer) -> None:
    plain = layer.forward
    # Paddle warns at every call whose inputs all want no gradient, as those above a frozen embedding: adapters inside
    # want theirs all the same. So there is one input that does.
    wanting = paddle.zeros([])
    wanting.stop_gradient = False

    def again(_wanting: paddle.Tensor, *args, **kwargs):
        return plain(*args, **kwargs)

    def forward(*args, **kwargs):  # the layer's own signature
        if not layer.training:
            return plain(*args, **kwargs)
        return recompute(again, wanting, *args, use_reentrant=False, **kwargs)

    layer.forward = forward
