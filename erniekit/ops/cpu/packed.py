"""Products with weights kept in few bits on their kernels (csrc/packed.cpp).

Shapes: T rows sorted by expert, E experts, D inputs, F outputs, C rows of codes, G groups.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import call


class _Product(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, codes_ECF, scales_EGF, counts_E, kind: int, bf16: bool):
        experts, groups, num_out = scales_EGF.shape
        ctx.weight, ctx.sizes = (codes_ECF, scales_EGF), (experts, x_TD.shape[1], num_out, groups, kind, bf16)
        ctx.counts_E = counts_E
        y_TF = paddle.empty([x_TD.shape[0], num_out], "float32")
        call("packed_forward", x_TD.contiguous(), counts_E, *ctx.weight, y_TF, *ctx.sizes)
        return y_TF

    @staticmethod
    def backward(ctx, grad_TF):
        grad_TD = paddle.empty([grad_TF.shape[0], ctx.sizes[1]], "float32")
        call("packed_backward", grad_TF.contiguous(), ctx.counts_E, *ctx.weight, grad_TD, *ctx.sizes)
        return grad_TD, None, None, None


def product(
    x_TD: paddle.Tensor, codes_ECF: paddle.Tensor, scales_EGF: paddle.Tensor, *, counts: list[int], kind: int,
    bf16: bool,
) -> paddle.Tensor:  # fmt: skip
    """x @ dense weight of each expert's rows; the weight has no gradient."""
    return _Product.apply(x_TD, codes_ECF, scales_EGF, paddle.to_tensor(counts, "int64"), kind, bf16)


def unpack(codes_CF: paddle.Tensor, scales_GF: paddle.Tensor, *, num_in: int, kind: int) -> paddle.Tensor:
    """The dense weight [D, F] in fp32."""
    groups, num_out = scales_GF.shape
    out_DF = paddle.empty([num_in, num_out], "float32")
    call("unpack", codes_CF, scales_GF, out_DF, num_in, num_out, groups, kind)
    return out_DF
