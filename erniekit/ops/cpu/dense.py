"""Linear, RMSNorm and the gated activation on the dense kernels (csrc/dense.cpp).

Shapes: `...` any leading dimensions, D and I sizes of the last one.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import call
from erniekit.ops.gradients import only, wanted


class _Linear(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_D, weight_DI, bias_I, bf16: bool):
        ctx.bf16, ctx.wanted, ctx.has_bias = bf16, wanted(x_D, weight_DI, bias_I), bias_I is not None
        x_D, weight_DI = x_D.contiguous(), weight_DI.contiguous()
        bias_I = bias_I.contiguous() if ctx.has_bias else None
        size, width = weight_DI.shape
        y_I = paddle.empty([*x_D.shape[:-1], width], "float32")
        call("linear_forward", x_D, weight_DI, bias_I, y_I, x_D.size // size, size, width, bf16)
        ctx.save_for_backward(weight_DI, *([x_D] if ctx.wanted[1] else []))  # only the weight's gradient needs x
        return y_I

    @staticmethod
    def backward(ctx, grad_I):
        weight_DI, *inputs = ctx.saved_tensor()
        x_D = inputs[0] if inputs else None
        size, width = weight_DI.shape
        shapes = ([*grad_I.shape[:-1], size], [size, width], [width])
        grads = [paddle.empty(s, "float32") if want else None for s, want in zip(shapes, ctx.wanted, strict=True)]
        sizes = (grad_I.size // width, size, width, ctx.bf16)
        call("linear_backward", x_D, weight_DI, grad_I.contiguous(), *grads, *sizes)
        return tuple(grads if ctx.has_bias else grads[:2])


class _RMSNorm(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_D, weight_D, eps: float):
        ctx.wanted = wanted(x_D, weight_D)
        x_D, weight_D = x_D.contiguous(), weight_D.contiguous()
        y_D, scales = paddle.empty_like(x_D), paddle.empty(x_D.shape[:-1], "float32")
        call("rms_norm_forward", x_D, weight_D, y_D, scales, scales.size, x_D.shape[-1], eps)
        ctx.save_for_backward(x_D, weight_D, scales)
        return y_D

    @staticmethod
    def backward(ctx, grad_D):
        x_D, weight_D, scales = ctx.saved_tensor()
        grads = only(ctx.wanted, [paddle.empty_like(x_D), paddle.empty_like(weight_D)])
        inputs = (x_D, weight_D, scales, grad_D.contiguous())
        call("rms_norm_backward", *inputs, *grads, scales.size, x_D.shape[-1])
        return grads


class _SwiGLU(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.wanted = wanted(gate, up)
        gate, up = gate.contiguous(), up.contiguous()
        out = paddle.empty_like(gate)
        call("swiglu_forward", gate, up, out, out.size)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensor()
        grads = [paddle.empty_like(gate), paddle.empty_like(up)]
        call("swiglu_backward", gate, up, grad.contiguous(), *grads, gate.size)
        return only(ctx.wanted, grads)


class _Gated(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, hidden_T2I):
        hidden_T2I = hidden_T2I.contiguous()
        rows, width = hidden_T2I.shape[0], hidden_T2I.shape[1] // 2
        out = paddle.empty([rows, width], "float32")
        call("gated_forward", hidden_T2I, out, rows, width)
        ctx.save_for_backward(hidden_T2I)
        return out

    @staticmethod
    def backward(ctx, grad_TI):
        (hidden_T2I,) = ctx.saved_tensor()
        grad_T2I = paddle.empty_like(hidden_T2I)
        call("gated_backward", hidden_T2I, grad_TI.contiguous(), grad_T2I, *grad_TI.shape)
        return grad_T2I


def linear(
    x_D: paddle.Tensor, weight_DI: paddle.Tensor, bias_I: paddle.Tensor | None, *, bf16: bool
) -> paddle.Tensor:
    """x @ weight (+ bias)."""
    return _Linear.apply(x_D, weight_DI, bias_I, bf16)


def rms_norm(x_D: paddle.Tensor, weight_D: paddle.Tensor, *, eps: float) -> paddle.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return _RMSNorm.apply(x_D, weight_D, eps)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


def gated(hidden_T2I: paddle.Tensor) -> paddle.Tensor:
    """silu(first half) * second half."""
    return _Gated.apply(hidden_T2I)
