"""A model that holds a part of itself: its parameters get the sizes of one rank, before they have any memory.

Names stay, layers stay; what layers know of their own sizes follows. Who holds what is said elsewhere (config/cut.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paddle import nn

from erniekit.models.layers import Linear, parameter
from erniekit.models.moe import Experts


def hold_part(model: nn.Layer, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give every parameter the shape that `shapes` names; under LazyGuard, none of them ever has its whole memory."""
    layers = dict(model.named_sublayers())
    for name, p in list(model.named_parameters()):
        if list(p.shape) == list(shapes[name]):
            continue
        path, _, own = name.rpartition(".")
        dtype, trainable = str(p.dtype).removeprefix("paddle."), not p.stop_gradient
        setattr(layers[path], own, parameter(layers[path], list(shapes[name]), dtype=dtype, trainable=trainable))
    for layer in layers.values():
        if isinstance(layer, Linear):
            layer.num_in, layer.num_out = layer.weight.shape
        elif isinstance(layer, Experts):
            layer.num_experts, layer.width, layer.size = layer.down_proj.shape
