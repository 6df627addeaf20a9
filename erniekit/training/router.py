"""What happens to routers outside the gradient: counting usage, the correction bias, the decoupled orthogonal step.

The count is taken once per micro-batch from what the forward pass returned, so recomputation cannot count twice.
"""

from __future__ import annotations

import paddle

from erniekit.losses.router import bias_step, orthogonal_gradient
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.moe import MoE, Routing
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tokens import TokenRanks
from erniekit.training.health import RouterHealth


def sparse_layers(model: ErnieForCausalLM) -> dict[str, MoE]:
    """All MoE blocks by name, in the order of the routings that the forward pass returns."""
    layers = {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    if model.config.num_nextn_predict_layers:
        layers |= {f"prediction block {i}": layer for i, layer in enumerate(model.model.mtp_block)}
    return {name: layer.mlp for name, layer in layers.items() if layer.sparse}


def sparse_blocks(model: ErnieForCausalLM) -> list[MoE]:
    """The values of `sparse_layers`."""
    return list(sparse_layers(model).values())


class RouterUpkeep:
    """Collects expert usage during a step and adjusts the routers after the optimizer."""

    def __init__(
        self, model: ErnieForCausalLM, *, bias_coefficient: float, orthogonal_lambda: float,
        health: RouterHealth | None = None, ranks: TokenRanks | None = None,
    ) -> None:  # fmt: skip
        """`bias_coefficient` 0 freezes the correction bias; `orthogonal_lambda` 0 leaves out the decoupled step;
        `health` is shown what was counted; the tokens of all `ranks` count."""
        self._blocks = sparse_blocks(model)
        self._coefficient, self._orthogonal = bias_coefficient, orthogonal_lambda
        self._usage: list[paddle.Tensor] = []
        self._ranks = ranks or TokenRanks(Mesh.single())
        self.health = health

    @paddle.no_grad()
    def count(self, routings: list[Routing], mask_M: paddle.Tensor) -> None:
        """Add one micro-batch: how often each expert was chosen by a token that is not padding."""
        real = paddle.nonzero(mask_M.reshape([-1])).reshape([-1])
        usage = []
        for block, routing in zip(self._blocks, routings, strict=True):
            chosen = paddle.gather(routing.experts_MK, real).reshape([-1])
            usage.append(paddle.bincount(chosen, minlength=block.gate.weight.shape[-1]).astype("float32"))
        self._usage = usage if not self._usage else [a + b for a, b in zip(self._usage, usage, strict=True)]
        if self.health is not None:
            self.health.measure([routing.logits_ME for routing in routings], real)

    @paddle.no_grad()
    def after_optimizer(self) -> dict[str, float]:
        """Move the biases, take the orthogonal step, forget the counts; returns balance figures for the log."""
        if not self._usage:
            return {}
        usage_LE = self._ranks.total(paddle.stack(self._usage))
        self._usage = []
        for block, usage_E in zip(self._blocks, usage_LE, strict=True):
            if block.gate.weight.stop_gradient:
                continue  # a frozen router is left alone altogether
            if self._coefficient:
                bias = block.moe_statics.e_score_correction_bias
                bias.set_value(bias_step(bias, usage_E, coefficient=self._coefficient))
            if self._orthogonal:
                weight = block.gate.weight
                weight.set_value(weight - self._orthogonal * orthogonal_gradient(weight))
        counts_LE = usage_LE.numpy()
        if self.health is not None:
            self.health.add(counts_LE)
        return {"expert_load_max": float((counts_LE.max(1) / counts_LE.mean(1).clip(min=1e-9)).max())}
