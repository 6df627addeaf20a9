"""The gated activation of every MLP: silu(gate) * up."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F


def swiglu_plain(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """The plain twin of `swiglu`."""
    return F.silu(gate) * up


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up, elementwise (Shazeer, arXiv 2002.05202)."""
    return F.swiglu(gate, up)
