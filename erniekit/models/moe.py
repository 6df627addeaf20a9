"""The mixture of experts: router, dispatcher, stacked experts, shared experts.

One device holds all experts here. Expert parallelism slices `experts.*` and swaps `dispatcher`, from outside; while
rows are under way to other devices the shared experts work.
Shapes: B batch, S positions, M = B*S tokens, D hidden size, E experts, K experts per token, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import paddle
import paddle.nn.functional as F
from paddle import nn

from erniekit.config.architecture import ErnieConfig
from erniekit.models.layers import MLP, parameter
from erniekit.ops.grouped import (
    add_up,
    combine,
    grouped_linear,
    grouped_mlp,
    permute,
    permute_weights,
    sort_by_expert,
)
from erniekit.ops.mlp import gated

ExpertProduct = Callable[[paddle.Tensor, paddle.Tensor, list[int]], paddle.Tensor]
ExpertMLP = Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor, list[int], paddle.Tensor | None], paddle.Tensor]


class Wire(Protocol):
    """How rows are written down where they travel to experts on other devices."""

    def encode(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """Rows as bytes, uint8 [T, bytes of a row]."""

    def decode(self, bytes_TB: paddle.Tensor) -> paddle.Tensor:
        """Rows again, fp32."""


class Routing(NamedTuple):
    """What the router decided for a batch of tokens. The router losses and the bias controller read it."""

    logits_ME: paddle.Tensor  # fp32, before the softmax, without the correction bias
    experts_MK: paddle.Tensor  # int64, no gradient
    weights_MK: paddle.Tensor  # fp32, normalised over K


def _text(value: int | tuple[int, int]) -> int:
    """A size of a text model, where it is one number (vision-language models have two)."""
    assert isinstance(value, int)
    return value


class MoEStatics(nn.Layer):
    """The correction bias: it selects experts, has no gradient, and is saved with the model."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.e_score_correction_bias = parameter(self, [1, num_experts], dtype="float32", trainable=False)


class Router(nn.Layer):
    """Softmax router, always in fp32. The bias selects; the raw probability weighs (models.md, "router")."""

    def __init__(self, cfg: ErnieConfig) -> None:
        super().__init__()
        self.experts_per_token, self.norm_min = cfg.moe_k, cfg.moe_norm_min
        self.weight = parameter(self, [cfg.hidden_size, _text(cfg.moe_num_experts)], dtype="float32")

    def forward(self, x_MD: paddle.Tensor, bias_1E: paddle.Tensor) -> Routing:
        """Choose K experts per token."""
        logits_ME = paddle.matmul(x_MD.astype("float32"), self.weight)
        probs_ME = F.softmax(logits_ME, axis=-1)
        # topk's indices carry a gradient flag in Paddle; detached, they cannot crash the backward pass.
        experts_MK = paddle.topk(probs_ME.detach() + bias_1E, self.experts_per_token, axis=-1)[1].detach()
        picked_MK = paddle.take_along_axis(probs_ME, experts_MK, axis=1)
        return Routing(logits_ME, experts_MK, picked_MK / picked_MK.sum(-1, keepdim=True).clip(min=self.norm_min))


class Experts(nn.Layer):
    """All routed experts as two stacked weights; gate first.

    Each weight has slots of a Linear (layers.py): `product(rows, weight, counts)` makes the product in its own way;
    `packed(rows, counts)` makes it in place of the weight, which is None then; `adapter(rows, product, counts)` returns
    the product that counts. Where there is nothing to do between the products, the slot `mlp(rows, gate_up, down,
    counts, weights)` may make all of it at once.

    A token's sum of outputs is weighted, and down is linear: so weights may as well be multiplied in before it.
    `weighs_rows`, set from outside, says that the rows are to come with their weights, and that their outputs are
    simply added up. `wire` says how rows come that come from other devices; None: as they are.
    """

    bf16_products = False  # precision/products.py
    weighs_rows = False
    wire: Wire | None = None

    def __init__(self, cfg: ErnieConfig, *, dtype: str) -> None:
        super().__init__()
        e, d, i = _text(cfg.moe_num_experts), cfg.hidden_size, _text(cfg.moe_intermediate_size)
        self.num_experts, self.size, self.width = e, d, i
        self.gate_up_proj = parameter(self, [e, d, 2 * i], dtype=dtype)
        self.down_proj = parameter(self, [e, i, d], dtype=dtype)
        self.mlp: ExpertMLP | None = None
        self.gate_up_product: ExpertProduct | None = None
        self.gate_up_packed: nn.Layer | None = None
        self.gate_up_adapter: nn.Layer | None = None
        self.down_product: ExpertProduct | None = None
        self.down_packed: nn.Layer | None = None
        self.down_adapter: nn.Layer | None = None

    def forward(
        self, x_TD: paddle.Tensor, counts: list[int], weights_T: paddle.Tensor | None = None
    ) -> paddle.Tensor:  # fmt: skip
        """Rows sorted by expert -> their outputs, times their weights if these are given."""
        between = (self.gate_up_packed, self.gate_up_adapter, self.down_packed, self.down_adapter)
        if self.mlp is not None and all(slot is None for slot in between):
            return self.mlp(x_TD, self.gate_up_proj, self.down_proj, counts, weights_T)
        slots = (*between, self.gate_up_product, self.down_product, weights_T)
        if all(slot is None for slot in slots):
            return grouped_mlp(x_TD, self.gate_up_proj, self.down_proj, counts=counts, bf16=self.bf16_products)
        hidden_T2I = self._product(x_TD, counts, "gate_up")
        inner_TI = gated(hidden_T2I)
        if weights_T is not None:
            inner_TI = inner_TI * weights_T.unsqueeze(-1).astype(inner_TI.dtype)
        return self._product(inner_TI, counts, "down")

    def _product(self, rows: paddle.Tensor, counts: list[int], which: str) -> paddle.Tensor:
        weight, product, packed, adapter = (
            getattr(self, f"{which}_{slot}") for slot in ("proj", "product", "packed", "adapter")
        )
        if packed is not None:
            made = packed(rows, counts)
        elif product is not None:
            made = product(rows, weight, counts)
        else:
            made = grouped_linear(rows, weight, counts=counts, bf16=self.bf16_products)
        return made if adapter is None else adapter(rows, made, counts)


class LocalDispatcher(nn.Layer):
    """Brings tokens to experts that live on this device, dropless, and sums their outputs. No parameters."""

    def forward(self, x_MD: paddle.Tensor, routing: Routing, experts: Experts) -> Callable[[], paddle.Tensor]:
        """Bring x [M, D] on its way. What is returned waits for it, lets the experts work and gives their sum [M, D]:
        whatever else there is to compute has its place in between."""
        order = sort_by_expert(routing.experts_MK, num_experts=experts.num_experts)
        x_TD = permute(x_MD, order)
        if experts.weighs_rows:
            weights_T = permute_weights(routing.weights_MK, order)
            return lambda: add_up(experts(x_TD, order.counts, weights_T), order)
        weights_MK = routing.weights_MK.astype(x_MD.dtype)
        return lambda: combine(experts(x_TD, order.counts), weights_MK, order)


class MoE(nn.Layer):
    """Routed experts plus, on every token, the shared experts (one MLP)."""

    def __init__(self, cfg: ErnieConfig, *, dtype: str) -> None:
        super().__init__()
        self.gate = Router(cfg)
        self.moe_statics = MoEStatics(_text(cfg.moe_num_experts))
        self.experts = Experts(cfg, dtype=dtype)
        self.dispatcher = LocalDispatcher()
        self.shared_experts = None
        if cfg.moe_num_shared_experts:
            self.shared_experts = MLP(cfg.hidden_size, cfg.shared_intermediate_size, bias=cfg.use_bias, dtype=dtype)

    def forward(self, x_BSD: paddle.Tensor) -> tuple[paddle.Tensor, Routing]:
        """[B, S, D] -> ([B, S, D], Routing)."""
        x_MD = x_BSD.reshape([-1, x_BSD.shape[-1]])
        routing = self.gate(x_MD, self.moe_statics.e_score_correction_bias)
        routed = self.dispatcher(x_MD, routing, self.experts)
        shared_BSD = self.shared_experts(x_BSD) if self.shared_experts is not None else None
        y_BSD = routed().reshape(x_BSD.shape)
        if shared_BSD is not None:
            y_BSD = y_BSD + shared_BSD
        return y_BSD, routing
