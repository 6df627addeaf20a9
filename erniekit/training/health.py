"""The health of the routers: who is used, who is not, how sure they are, how far the biases have moved.

Tokens per expert are summed over a window of steps from what the router upkeep counts anyway; the rest is measured in
the window's last step only, so that it costs next to nothing. Judges and warns; changes nothing.

Shapes: L sparse layers, E experts, M tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from erniekit.base.console import warn
from erniekit.losses.router import orthogonal_loss
from erniekit.models.moe import MoE
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tokens import TokenRanks

_LEAST_TOKENS = 16  # of an average expert in a window: with fewer, an unused one may be chance
_HEAT = np.array([[13, 8, 60], [84, 15, 109], [187, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
_CELL = 12  # pixels of an expert in the picture


class RouterHealth:
    """Sums what happens in a window of steps and tells at its end."""

    def __init__(
        self, layers: Mapping[str, MoE], *, experts_per_token: int, window: int, ranks: TokenRanks | None = None
    ) -> None:
        """`layers` by the name under which warnings speak of them; `window` in steps; what is measured is summed over
        the tokens of all `ranks`."""
        self._layers, self._k, self._window = dict(layers), experts_per_token, window
        self._counts_LE: np.ndarray | None = None
        self._ranks = ranks or TokenRanks(Mesh.single())
        self._measured: list[paddle.Tensor] = []  # of every micro-batch: summed entropies by layer, tokens
        self._entropy_L = np.zeros(len(self._layers))
        self._measuring = False
        self._ill: set[str] = set()

    def begin(self, step: int, *, last: bool) -> None:
        """The 0-based step begins; its end may be the end of a window."""
        self._measuring = (step + 1) % self._window == 0 or last
        self._measured = []

    @paddle.no_grad()
    def measure(self, logits: Sequence[paddle.Tensor], real: paddle.Tensor) -> None:
        """Look at a micro-batch: the routers' logits [M, E] by layer, and which tokens are not padding."""
        if self._measuring:
            logs = [F.log_softmax(paddle.gather(logits_ME, real), axis=-1) for logits_ME in logits]
            sums = [-(log.exp() * log).sum() for log in logs]
            self._measured.append(paddle.stack([*sums, paddle.to_tensor(float(real.shape[0]))]))

    @paddle.no_grad()
    def add(self, usage_LE: np.ndarray) -> None:
        """Add a step's tokens per expert, those of all ranks; all ranks call this together."""
        self._counts_LE = usage_LE if self._counts_LE is None else self._counts_LE + usage_LE
        if self._measured:
            sums = self._ranks.total(paddle.stack(self._measured)).numpy()
            self._entropy_L = (sums[:, :-1] / sums[:, -1:].clip(min=1.0)).mean(0)

    def report(self, step: int) -> dict[str, Any]:
        """The figures after the 1-based `step` if its end was to be told, else nothing. Warns of what is new."""
        if not self._measuring or self._counts_LE is None:
            return {}
        counts_LE, entropy_L = self._counts_LE, self._entropy_L
        if step % self._window == 0:
            self._counts_LE = None
        imbalance_L = counts_LE.max(1) / counts_LE.mean(1).clip(min=1e-9)
        self._warn(step, counts_LE, imbalance_L=imbalance_L, entropy_L=entropy_L)
        blocks = self._layers.values()
        biases = [block.moe_statics.e_score_correction_bias for block in blocks]
        return {
            "moe_dead_experts": int((counts_LE == 0).sum()),
            "moe_imbalance": float(imbalance_L.max()),
            "moe_entropy": float(entropy_L.mean() / math.log(counts_LE.shape[1])) if counts_LE.shape[1] > 1 else 1.0,
            "moe_bias_drift": max(float(bias.max() - bias.min()) for bias in biases),
            "moe_orthogonality": float(np.mean([float(orthogonal_loss(block.gate.weight)) for block in blocks])),
            "moe_tokens": counts_LE.astype(int).tolist(),
        }

    def _warn(self, step: int, counts_LE: np.ndarray, *, imbalance_L: np.ndarray, entropy_L: np.ndarray) -> None:
        num_experts = counts_LE.shape[1]
        most = max(2.0, min(5.0, 0.8 * num_experts / self._k))  # num_experts / k is the worst there can be
        least = max(1.2, self._k / 2)  # experts that the router weighs as equals, e^entropy
        dead_L = np.where(counts_LE.mean(1) >= _LEAST_TOKENS, (counts_LE == 0).sum(1), 0)
        findings = {
            "dead": (dead_L > 0, lambda i: f"{dead_L[i]} of {num_experts} experts got no token in {self._window} steps",
                     "raise moe_use_aux_free_update_coef (with moe_use_aux_free) or moe_aux_loss_lambda, or lower "
                     "learning_rate"),
            "load": (imbalance_L > most, lambda i: f"one expert has {imbalance_L[i]:.1f} times the mean load",
                     "raise moe_use_aux_free_update_coef (with moe_use_aux_free) or moe_aux_loss_lambda"),
            "entropy": (np.exp(entropy_L) < least,
                        lambda i: f"the router weighs {math.exp(entropy_L[i]):.2f} experts where {self._k} are used",
                        "its logits have grown: set moe_z_loss_lambda, or lower learning_rate or moe_gate_lr_ratio"),
        }  # fmt: skip
        names = list(self._layers)
        for kind, (found_L, say, way_out) in findings.items():
            if found_L.any() and kind not in self._ill:
                where = [f"{names[i]}: {say(i)}" for i in np.flatnonzero(found_L)]
                more = f" (and {len(where) - 3} layers more)" if len(where) > 3 else ""
                warn(f"step {step}: {'; '.join(where[:3])}{more}. To mend it: {way_out}.")
            (self._ill.add if found_L.any() else self._ill.discard)(kind)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the window that is not full, and what was warned of."""
        counts = None if self._counts_LE is None else self._counts_LE.astype(int).tolist()
        return {"counts": counts, "warned": sorted(self._ill)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._counts_LE = None if state["counts"] is None else np.array(state["counts"], np.float32)
        self._ill = set(state["warned"])


def heat_map(counts_LE: Sequence[Sequence[int]]) -> np.ndarray:
    """A picture [H, W, 3] of uint8: a line for each layer, dark for unused experts, bright from twice the mean on."""
    counts = np.asarray(counts_LE, np.float64)
    level_LE = (counts / counts.mean(1, keepdims=True).clip(min=1e-9) / 2).clip(0, 1) * (len(_HEAT) - 1)
    low_LE = np.minimum(level_LE.astype(int), len(_HEAT) - 2)
    share_LE1 = (level_LE - low_LE)[..., None]
    colours = _HEAT[low_LE] * (1 - share_LE1) + _HEAT[low_LE + 1] * share_LE1
    return colours.round().astype(np.uint8).repeat(_CELL, 0).repeat(_CELL, 1)
