"""Which weights a quantised `compute_type` keeps in few bits, and how many bytes they take then.

Modules have their names in memory: `model.layers.0.self_attn.q_proj`, and `model.layers.1.mlp.experts.gate_up_proj` for
the stacked experts of a layer. Embedding, norms, biases, routers and the head are in no row: they stay as they are.
Knows names and shapes, no number (precision/quantize.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from erniekit.base.errors import ConfigError, listed
from erniekit.config.run import RunConfig

Kind = Literal["int8", "int4", "nf4"]

EXPERTS = r"\.mlp\.experts\.(gate_up|down)_proj$"
LINEARS = r"\.(self_attn\.[qkvo]_proj|mlp\.(shared_experts\.)?(gate|up|down)_proj|mtp_linear_proj\.\d+)$"

TABLES: dict[str, dict[str, Kind]] = {
    "wint8": {EXPERTS: "int8", LINEARS: "int8"},
    "wint4/8": {EXPERTS: "int4", LINEARS: "int8"},
    "wint4": {EXPERTS: "int4", LINEARS: "int4"},
    "nf4": {EXPERTS: "nf4", LINEARS: "nf4"},
}
NF4_BLOCK = 64  # of arXiv 2305.14314
PER_CHANNEL = -1  # group_size: one scale for all inputs of an output


@dataclass(frozen=True)
class Packing:
    """A table of module names (pattern -> kind) and how many inputs share a scale: all if `group_size` is None."""

    compute_type: str
    group_size: int | None = None

    def kind_of(self, module: str) -> Kind | None:
        """How the weight of a module is kept; None: as it is."""
        return next((kind for row, kind in TABLES[self.compute_type].items() if re.search(row, module)), None)

    def num_bytes(self, module: str, shape: tuple[int, ...]) -> int:
        """Codes and fp32 scales of the weight [in, out], or [experts, in, out], of a module that a row names."""
        *experts, num_in, num_out = shape
        rows = num_in if self.kind_of(module) == "int8" else -(-num_in // 2)
        return math.prod(experts) * num_out * (rows + 4 * (num_in // (self.group_size or num_in)))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError naming every module whose inputs are no multiple of the group size."""
        inputs = {module: shape[-2] for module, shape in shapes.items() if self.kind_of(module)}
        wrong = [module for module, num_in in inputs.items() if num_in % (self.group_size or 1)]
        if wrong:
            named = ", ".join(listed([f"{module} has {inputs[module]}" for module in wrong], limit=3))
            raise ConfigError(
                f"compute_type {self.compute_type} gives every {self.group_size} inputs a scale of their own, and that "
                f"does not divide the inputs of {len(wrong)} modules: {named}. Set group_size to a divisor of "
                f"{math.gcd(*inputs.values())}, or to {PER_CHANNEL} for one scale per output."
            )


def packing_of(config: RunConfig) -> Packing | None:
    """How the run's `compute_type` packs weights; None if it is no quantised one."""
    name, group_size = config.model.compute_type, config.precision.group_size
    if name not in TABLES:
        return None
    if group_size is None:
        group_size = NF4_BLOCK if name == "nf4" else PER_CHANNEL
    return Packing(name, None if group_size == PER_CHANNEL else group_size)
