"""Router losses: load balance, z-loss, orthogonality (techniques.md sections 1.3 and 2), and the bias controller.

Padding tokens are masked out of every statistic. Shapes: M tokens, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F

Reduce = Callable[[paddle.Tensor], paddle.Tensor]  # sums a tensor over the ranks that hold other tokens of a micro-step


def _same(x: paddle.Tensor) -> paddle.Tensor:
    return x


def balance_loss(
    logits_ME: paddle.Tensor, mask_M: paddle.Tensor, *, experts_per_token: int, reduce: Reduce = _same
) -> paddle.Tensor:
    """E * sum_e mean(p_e) * f_e (Switch Transformer, arXiv 2101.03961, eq. 4, without dividing by k).

    f_e is the share of tokens whose top-k of p (without the correction bias) holds e. Perfect balance gives k, not 1.
    """
    weight_M1 = mask_M.astype("float32").unsqueeze(-1)
    probs_ME = F.softmax(logits_ME, axis=-1)
    top_MK = paddle.topk(probs_ME.detach(), experts_per_token, axis=-1)[1].detach()
    chosen_ME = F.one_hot(top_MK, logits_ME.shape[-1]).sum(1)
    num_experts = logits_ME.shape[-1]
    sums = [weight_M1.sum(0), (probs_ME * weight_M1).sum(0), (chosen_ME * weight_M1).sum(0)]
    tokens_1, sum_E, chosen_E = paddle.split(reduce(paddle.concat(sums)), [1, num_experts, num_experts])
    tokens_1 = tokens_1.clip(min=1.0)
    return num_experts * (sum_E / tokens_1 * (chosen_E / tokens_1).detach()).sum()


def z_loss(logits_ME: paddle.Tensor, mask_M: paddle.Tensor, *, reduce: Reduce = _same) -> paddle.Tensor:
    """mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    weight_M = mask_M.astype("float32")
    squared_M = paddle.square(paddle.logsumexp(logits_ME, axis=-1))
    total, tokens = reduce(paddle.stack([(squared_M * weight_M).sum(), weight_M.sum()])).unbind()
    return total / tokens.clip(min=1.0)


def orthogonal_loss(weight_DE: paddle.Tensor) -> paddle.Tensor:
    """|| W^T W - I ||_F^2 / E^2 over the unit columns of the router weight (techniques.md section 2)."""
    unit_DE = weight_DE / weight_DE.norm(p=2, axis=0, keepdim=True).clip(min=1e-12)
    num = weight_DE.shape[1]
    gram_EE = paddle.matmul(unit_DE, unit_DE, transpose_x=True)
    return paddle.square(gram_EE - paddle.eye(num)).sum() / num**2


@paddle.no_grad()
def orthogonal_gradient(weight_DE: paddle.Tensor) -> paddle.Tensor:
    """The gradient of `orthogonal_loss`, in closed form (techniques.md section 2), for the decoupled step."""
    norm_E = weight_DE.norm(p=2, axis=0, keepdim=True).clip(min=1e-12)
    unit_DE = weight_DE / norm_E
    num = weight_DE.shape[1]
    error_EE = paddle.matmul(unit_DE, unit_DE, transpose_x=True) - paddle.eye(num)
    pull_DE = paddle.matmul(unit_DE, error_EE)
    along_E = (pull_DE * unit_DE).sum(0, keepdim=True)
    return (4.0 / num**2) * (pull_DE - unit_DE * along_E) / norm_E


@paddle.no_grad()
def bias_step(bias_E: paddle.Tensor, usage_E: paddle.Tensor, *, coefficient: float) -> paddle.Tensor:
    """The correction bias after one optimizer step: b + u * sign(mean(usage) - usage) (arXiv 2408.15664, alg. 1)."""
    return bias_E + coefficient * paddle.sign(usage_E.mean() - usage_E)
