"""What an adapter is, apart from its numbers: the record that a model in memory, a run and an adapter folder share.

Knows no file, no key of a run and no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Start = Literal["default", "pissa"]
SCORE = "score"  # the head of a reward model


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (arXiv 2106.09685): W + scaling * A B at every target.

    `targets` are module paths of the model in memory: "model.layers.0.self_attn.q_proj", and for the stacked routed
    experts "model.layers.1.mlp.experts.gate_up_proj" and ".down_proj". `modules_to_save` are paths of modules that are
    trained whole. `rslora`: arXiv 2312.03732, `dora`: 2402.09353, `init` pissa: 2404.02948.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Start = "default"
    targets: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def is_reward(self) -> bool:
        """Whether it makes a reward model of a language model."""
        return SCORE in self.modules_to_save

    @property
    def scaling(self) -> float:
        """The factor on A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
