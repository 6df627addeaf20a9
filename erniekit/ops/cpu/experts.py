"""PyLayers of the routed experts.

Shapes: M tokens, C experts per token, T = M*C routed rows, D hidden size, E experts, I expert width.
"""

from __future__ import annotations

import paddle

from erniekit.ops.cpu.library import library
from erniekit.ops.gradients import only, wanted


def sort_by_expert(experts_MC: paddle.Tensor, num_experts: int) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """(token_T, place_MC, counts_E), all int64, by a stable counting sort."""
    experts_MC = experts_MC.detach().contiguous()
    token_T, place_MC = paddle.empty([experts_MC.size], "int64"), paddle.empty_like(experts_MC)
    counts_E = paddle.empty([num_experts], "int64")
    choices = experts_MC.shape[1]
    library().call("sort_by_expert", experts_MC, token_T, place_MC, counts_E, token_T.size, choices, num_experts)
    return token_T, place_MC, counts_E


class Permute(paddle.autograd.PyLayer):
    """Rows copied once per choice, sorted by expert."""

    @staticmethod
    def forward(ctx, x_MD, token_T, place_MC):
        ctx.save_for_backward(place_MC)
        y_TD = paddle.empty([token_T.shape[0], x_MD.shape[1]], "float32")
        library().call("permute", x_MD.contiguous(), token_T, y_TD, *y_TD.shape)
        return y_TD

    @staticmethod
    def backward(ctx, grad_TD):
        (place_MC,) = ctx.saved_tensor()
        grad_MD = paddle.empty([place_MC.shape[0], grad_TD.shape[1]], "float32")
        library().call("combine", grad_TD.contiguous(), None, place_MC, grad_MD, *place_MC.shape, grad_TD.shape[1])
        return grad_MD, None, None


class Combine(paddle.autograd.PyLayer):
    """Weighted sum of every token's rows."""

    @staticmethod
    def forward(ctx, y_TD, weights_MC, place_MC):
        ctx.wanted = wanted(y_TD, weights_MC)
        y_TD, weights_MC = y_TD.contiguous(), weights_MC.contiguous()
        ctx.save_for_backward(y_TD, weights_MC, place_MC)
        out_MD = paddle.empty([place_MC.shape[0], y_TD.shape[1]], "float32")
        library().call("combine", y_TD, weights_MC, place_MC, out_MD, *place_MC.shape, y_TD.shape[1])
        return out_MD

    @staticmethod
    def backward(ctx, grad_MD):
        y_TD, weights_MC, place_MC = ctx.saved_tensor()
        grads = [paddle.empty_like(y_TD), paddle.empty_like(weights_MC)]
        sizes = (*place_MC.shape, y_TD.shape[1])
        library().call("combine_backward", y_TD, weights_MC, place_MC, grad_MD.contiguous(), *grads, *sizes)
        return (*only(ctx.wanted, grads), None)


class GroupedMLP(paddle.autograd.PyLayer):
    """One gated MLP per expert over its rows."""

    @staticmethod
    def forward(ctx, x_TD, gate_up_ED2I, down_EID, counts: list[int]):
        ctx.wanted = wanted(x_TD, gate_up_ED2I, down_EID)
        inputs = [t.contiguous() for t in (x_TD, gate_up_ED2I, down_EID, paddle.to_tensor(counts, "int64"))]
        ctx.sizes = down_EID.shape[0], down_EID.shape[2], down_EID.shape[1]
        hidden_T2I = paddle.empty([x_TD.shape[0], gate_up_ED2I.shape[2]], "float32")
        y_TD = paddle.empty(x_TD.shape, "float32")
        library().call("experts_forward", *inputs, hidden_T2I, y_TD, *ctx.sizes)
        ctx.save_for_backward(*inputs, hidden_T2I)
        return y_TD

    @staticmethod
    def backward(ctx, grad_TD):
        saved = ctx.saved_tensor()
        grads = only(ctx.wanted, [paddle.empty_like(t) for t in saved[:3]])
        library().call("experts_backward", *saved, grad_TD.contiguous(), *grads, *ctx.sizes)
        return grads
