"""PyLayers of the dense kernels: linear, RMSNorm, gated activation. They know tensors, not models.

Shapes: `...` any leading dimensions, D and I sizes of the last one.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import library


class Linear(paddle.autograd.PyLayer):
    """x @ weight (+ bias)."""

    @staticmethod
    def forward(ctx, x_D, weight_DI, bias_I):
        ctx.wanted = [t is not None and not t.stop_gradient for t in (x_D, weight_DI, bias_I)]
        ctx.has_bias = bias_I is not None
        x_D, weight_DI = x_D.contiguous(), weight_DI.contiguous()
        ctx.save_for_backward(x_D, weight_DI)
        size, width = weight_DI.shape
        y_I = paddle.empty([*x_D.shape[:-1], width], "float32")
        bias_I = bias_I.contiguous() if ctx.has_bias else None
        library().call("linear_forward", x_D, weight_DI, bias_I, y_I, x_D.size // size, size, width)
        return y_I

    @staticmethod
    def backward(ctx, grad_I):
        x_D, weight_DI = ctx.saved_tensor()
        size, width = weight_DI.shape
        like = (x_D.shape, [size, width], [width])
        grads = [paddle.empty(shape, "float32") if wanted else None for shape, wanted in zip(like, ctx.wanted)]
        library().call("linear_backward", x_D, weight_DI, grad_I.contiguous(), *grads, x_D.size // size, size, width)
        return tuple(grads) if ctx.has_bias else tuple(grads[:2])


class RMSNorm(paddle.autograd.PyLayer):
    """x / sqrt(mean(x^2) + eps) * weight."""

    @staticmethod
    def forward(ctx, x_D, weight_D, eps: float):
        ctx.wanted = [not x_D.stop_gradient, not weight_D.stop_gradient]
        x_D, weight_D = x_D.contiguous(), weight_D.contiguous()
        y_D, scales = paddle.empty_like(x_D), paddle.empty(x_D.shape[:-1], "float32")
        library().call("rms_norm_forward", x_D, weight_D, y_D, scales, scales.size, x_D.shape[-1], eps)
        ctx.save_for_backward(x_D, weight_D, scales)
        return y_D

    @staticmethod
    def backward(ctx, grad_D):
        x_D, weight_D, scales = ctx.saved_tensor()
        grads = [paddle.empty_like(t) if wanted else None for t, wanted in zip((x_D, weight_D), ctx.wanted)]
        inputs = (x_D, weight_D, scales, grad_D.contiguous())
        library().call("rms_norm_backward", *inputs, *grads, scales.size, x_D.shape[-1])
        return tuple(grads)


class SwiGLU(paddle.autograd.PyLayer):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.wanted = [not gate.stop_gradient, not up.stop_gradient]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = paddle.empty_like(gate)
        library().call("swiglu_forward", gate, up, out, out.size)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensor()
        grads = [paddle.empty_like(gate), paddle.empty_like(up)]
        library().call("swiglu_backward", gate, up, grad.contiguous(), *grads, gate.size)
        return tuple(made if wanted else None for made, wanted in zip(grads, ctx.wanted))
