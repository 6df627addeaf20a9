"""RMSNorm (models.md, "norm"): fp32 statistics, cast back to the input's type, then times the weight.

Shapes: D hidden size; `...` any leading dimensions.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu import dense
from erniekit.ops.dispatch import backend


def rms_norm_plain(x: paddle.Tensor, weight_D: paddle.Tensor, *, eps: float) -> paddle.Tensor:
    """The plain twin of `rms_norm`."""
    wide = x.astype("float32")
    scale = paddle.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale).astype(x.dtype) * weight_D


def rms_norm(x: paddle.Tensor, weight_D: paddle.Tensor, *, eps: float) -> paddle.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., D] -> [..., D]."""
    chosen = dense.rms_norm if backend(x, weight_D) == "cpu" else rms_norm_plain
    return chosen(x, weight_D, eps=eps)
