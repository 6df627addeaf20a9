"""The objective of pre-training and supervised fine-tuning: next-token loss, multi-token prediction, router losses.

Only the main loss is reported; the others enter as gradients (as in the official toolkit) and are logged beside it.
`run_trunk` and `beside` serve every objective: what is minimised differs, what stands beside it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import paddle

from erniekit.data.batch import Batch
from erniekit.losses.router import balance_loss, orthogonal_loss, z_loss
from erniekit.losses.token import balanced_loss, gradient_only, mean_loss
from erniekit.models.decoder import ErnieForCausalLM, Trunk
from erniekit.ops.cross_entropy import IGNORED
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tokens import TokenRanks
from erniekit.training.router import sparse_blocks
from erniekit.training.step import Losses, Totals


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the terms beside the main loss; `token_balance` picks the denominator (losses/token.py). Routers
    are judged by the tokens of all `ranks`."""

    balance: float = 0.0
    z: float = 0.0
    orthogonal: float = 0.0
    multi_token: float = 0.0
    token_balance: bool = False
    ranks: TokenRanks = field(default_factory=lambda: TokenRanks(Mesh.single()), compare=False)


def labels_ahead(batch: Batch, *, depth: int) -> np.ndarray:
    """Labels of prediction depth `depth` >= 1: the label `depth` positions on, within the same document, where the
    position itself is trained (the official toolkit shifts the labels and not the mask)."""
    ahead = np.full_like(batch.labels, IGNORED)
    ahead[:, :-depth] = batch.labels[:, depth:]
    same = np.zeros(batch.labels.shape, bool)
    same[:, :-depth] = batch.segment_ids[:, depth:] == batch.segment_ids[:, :-depth]
    ahead[~(same & (batch.labels != IGNORED))] = IGNORED
    return ahead


@dataclass(frozen=True)
class LanguageModelObjective:
    """Callable as a training.step.Objective."""

    weights: LossWeights

    def begin(self, model: ErnieForCausalLM, batches: Sequence[Batch]) -> None:
        """Nothing to look at: a token's loss depends on no other micro-batch."""

    def __call__(self, model: ErnieForCausalLM, batch: Batch, totals: Totals) -> Losses:
        """The loss of one micro-batch, divided by the step's global totals."""
        trunk = run_trunk(model, batch)
        loss = _token_loss(model, trunk.hidden_BSD, batch.labels, totals, self.weights)
        return beside(loss, model, trunk, batch, totals, weights=self.weights, ahead=batch)


def run_trunk(model: ErnieForCausalLM, batch: Batch) -> Trunk:
    """The training forward of a batch, up to the head."""
    return model.trunk(*map(paddle.to_tensor, (batch.input_ids, batch.position_ids, batch.end_rows)))


def beside(
    loss: paddle.Tensor, model: ErnieForCausalLM, trunk: Trunk, batch: Batch, totals: Totals, *,
    weights: LossWeights, ahead: Batch,
) -> Losses:  # fmt: skip
    """`loss` with the gradients of multi-token prediction, on the labels of `ahead`, and of the router losses."""
    mask_M = weights.ranks.seen(paddle.to_tensor(batch.segment_ids > 0))
    extra, parts = [], {}
    for depth, hidden_BSD in enumerate(trunk.mtp_hidden, start=1):
        predicted = _token_loss(model, hidden_BSD, labels_ahead(ahead, depth=depth), totals, weights)
        extra.append(weights.multi_token * predicted)
        parts[f"mtp_loss_{depth}"] = predicted.detach()
    for name, (weight, value) in _router_terms(model, trunk.routings, mask_M, weights).items():
        extra.append(weight * value / totals.micro_batches)
        parts[name] = value.detach() / totals.micro_batches
    for term in extra:
        loss = loss + gradient_only(term)
    return Losses(loss, parts, trunk.routings, mask_M)


def _token_loss(
    model: ErnieForCausalLM, hidden_BSD: paddle.Tensor, labels: np.ndarray, totals: Totals, weights: LossWeights
) -> paddle.Tensor:
    labels_M = paddle.to_tensor(labels).reshape([-1])
    loss_sum = model.lm_head.loss_sum(hidden_BSD.reshape([-1, hidden_BSD.shape[-1]]), labels_M)
    if weights.token_balance:
        return balanced_loss(loss_sum, trained=totals.trained, positions=totals.positions)
    return mean_loss(loss_sum, trained=totals.trained)


def _router_terms(
    model: ErnieForCausalLM, routings: list, mask_M: paddle.Tensor, weights: LossWeights
) -> dict[str, tuple[float, paddle.Tensor]]:
    """Name -> (coefficient, sum over the sparse layers), for the coefficients that are not 0."""
    if not routings:
        return {}
    k, reduce, terms = model.config.moe_k, weights.ranks.total, {}
    if weights.balance:
        values = [balance_loss(r.logits_ME, mask_M, experts_per_token=k, reduce=reduce) for r in routings]
        terms["aux_loss"] = (weights.balance, paddle.stack(values).sum())
    if weights.z:
        values = [z_loss(r.logits_ME, mask_M, reduce=reduce) for r in routings]
        terms["z_loss"] = (weights.z, paddle.stack(values).sum())
    if weights.orthogonal:
        values = [orthogonal_loss(block.gate.weight) for block in sparse_blocks(model)]
        terms["orthogonal_loss"] = (weights.orthogonal, weights.ranks.of_weights(paddle.stack(values).sum()))
    return terms
