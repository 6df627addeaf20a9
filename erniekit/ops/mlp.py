"""The two pieces of every MLP: the linear layer, and the gated activation silu(gate) * up.

Shapes: `...` any leading dimensions, D and I sizes of the last one.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import dense
from erniekit.ops.dispatch import backend


def linear(
    x_D: paddle.Tensor, weight_DI: paddle.Tensor, bias_I: paddle.Tensor | None, *, bf16: bool = False
) -> paddle.Tensor:
    """x @ weight (+ bias); x [..., D] -> [..., I]. Its plain twin is `F.linear`; `bf16` is for the CPU's kernels."""
    if backend(x_D, weight_DI) == "cpu":
        return dense.linear(x_D, weight_DI, bias_I, bf16=bf16)
    return F.linear(x_D, weight_DI, bias_I)


def swiglu_plain(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """The plain twin of `swiglu`."""
    return F.silu(gate) * up


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up, elementwise (Shazeer, arXiv 2002.05202)."""
    chosen = {"cpu": dense.swiglu, "gpu": F.swiglu, "plain": swiglu_plain}[backend(gate, up)]
    return chosen(gate, up)


def gated_plain(hidden_2I: paddle.Tensor) -> paddle.Tensor:
    """The plain twin of `gated`."""
    return swiglu_plain(*hidden_2I.chunk(2, axis=-1))


def gated(hidden_2I: paddle.Tensor) -> paddle.Tensor:
    """silu(first half) * second half of rows [T, 2I] -> [T, I], as swiglu without cutting the rows apart."""
    chosen = {"cpu": dense.gated, "gpu": F.swiglu, "plain": gated_plain}[backend(hidden_2I)]
    return chosen(hidden_2I)
