"""The two pieces of every MLP: the linear layer, and the gated activation silu(gate) * up.

Shapes: `...` any leading dimensions, D and I sizes of the last one; T rows.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from erniekit.ops.cpu import dense, experts
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


def weighted_gated_plain(hidden_T2I: paddle.Tensor, weights_T: paddle.Tensor | None) -> paddle.Tensor:
    """The plain twin of `weighted_gated`."""
    inner_TI = gated(hidden_T2I.astype("float32"))
    return inner_TI if weights_T is None else inner_TI * weights_T.astype("float32").unsqueeze(-1)


def weighted_gated(hidden_T2I: paddle.Tensor, weights_T: paddle.Tensor | None) -> paddle.Tensor:
    """`gated`, and every row times its weight, in fp32: what a kernel makes before it casts. For use in a PyLayer."""
    fast = backend(hidden_T2I, *_there(weights_T)) == "cpu"
    return (experts.weighted_gated if fast else weighted_gated_plain)(hidden_T2I, weights_T)


def _there(tensor: paddle.Tensor | None) -> list[paddle.Tensor]:
    return [] if tensor is None else [tensor]


def weighted_gated_backward_plain(
    hidden_T2I: paddle.Tensor, weights_T: paddle.Tensor | None, grad_TI: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor | None]:
    """The plain twin of `weighted_gated_backward`."""
    gate_TI, up_TI = hidden_T2I.astype("float32").chunk(2, axis=-1)
    grad_TI, sigma_TI = grad_TI.astype("float32"), F.sigmoid(gate_TI)
    silu_TI = gate_TI * sigma_TI
    inner_TI, grad_T = silu_TI * up_TI, None
    if weights_T is not None:
        grad_T = (grad_TI * inner_TI).sum(-1).astype(weights_T.dtype)
        weights_T1 = weights_T.astype("float32").unsqueeze(-1)
        inner_TI, grad_TI = inner_TI * weights_T1, grad_TI * weights_T1
    grad_gate_TI = grad_TI * up_TI * (sigma_TI + silu_TI * (1.0 - sigma_TI))
    return inner_TI, paddle.concat([grad_gate_TI, grad_TI * silu_TI], axis=-1), grad_T


def weighted_gated_backward(
    hidden_T2I: paddle.Tensor, weights_T: paddle.Tensor | None, grad_TI: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor | None]:
    """(the result once more, gradient of hidden, gradient of the weights) of `weighted_gated`, in fp32."""
    fast = backend(hidden_T2I, grad_TI, *_there(weights_T)) == "cpu"
    return (experts.weighted_gated_backward if fast else weighted_gated_backward_plain)(hidden_T2I, weights_T, grad_TI)
