"""What is trained and how fast: parameters picked by their names.

A pattern is a regular expression that is looked for in a parameter's name. One that matches nothing is an error: a
misspelt pattern would otherwise train what was to be frozen. Knows names only, no optimizer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from erniekit.base.console import notice
from erniekit.base.errors import ConfigError
from erniekit.config.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from erniekit.models.decoder import ErnieForCausalLM

EMBEDDING = r"^model\.embed_tokens\."
HEAD = r"^lm_head\."
ROUTERS = r"\.mlp\.gate\.weight$"
_EXPERTS = r"\.mlp\.experts\."
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def trained_names(names: Sequence[str], keys: OptimizerConfig) -> set[str]:
    """Those of `names`, a model's parameters, that the run trains.

    Raises ConfigError for a pattern without a match, and if nothing is left.
    """
    wanted, problems = set(names), list[str]()
    key, only = _only(keys)
    if only:
        wanted = _matching(only, names, key=key, problems=problems)
    if keys.freeze:
        wanted -= _matching(keys.freeze, names, key="freeze", problems=problems)
    if not (problems or wanted):
        problems.append("freeze, train_only, train_emb_only and train_moe_only leave no parameter to train.")
    if problems:
        raise ConfigError(problems)
    return wanted


def freeze(model: ErnieForCausalLM, keys: OptimizerConfig) -> None:
    """Take the gradient flag from every parameter that the run does not train."""
    from erniekit.adapters.lora import adapter_config_of  # here: names are picked without Paddle

    parameters = dict(model.named_parameters())
    usual = {name for name, p in parameters.items() if not p.stop_gradient}
    # Beside adapters the base is frozen as it is: a pattern must pick something among what they train.
    wanted = usual & trained_names(sorted(usual) if adapter_config_of(model) else list(parameters), keys)
    for name, p in parameters.items():
        p.stop_gradient = name not in wanted
    if len(wanted) < len(usual):
        numbers = sum(parameters[name].size for name in wanted)
        notice(f"trained: {len(wanted)} of {len(usual)} tensors, {numbers:,} numbers; the rest is frozen")


def rate_factors(
    names: Sequence[str], *, num_layers: int, keys: OptimizerConfig, b_rate: float = 1.0
) -> dict[str, float]:
    """Factor on the learning rate for every parameter; several that apply are multiplied. `b_rate` is that of the B
    matrices of adapters (LoRA+).

    Raises ConfigError for a pattern without a match.
    """
    factors, problems = {name: _depth_factor(name, num_layers, keys) for name in names}, list[str]()
    for pattern, factor in (keys.lr_multipliers or {}).items():
        for name in _matching([pattern], names, key="lr_multipliers", problems=problems):
            factors[name] *= factor
    if problems:
        raise ConfigError(problems)
    if keys.moe_gate_lr_ratio is not None:
        for name in names:
            factors[name] *= keys.moe_gate_lr_ratio if re.search(ROUTERS, name) else 1.0
    return {name: factor * b_rate if name.endswith(".lora_B") else factor for name, factor in factors.items()}


def _only(keys: OptimizerConfig) -> tuple[str, list[str]]:
    """Which key says what alone is trained, and the patterns that it stands for."""
    if keys.train_emb_only:
        return "train_emb_only", [EMBEDDING]
    if keys.train_moe_only:
        return "train_moe_only", [ROUTERS, _EXPERTS]
    return "train_only", keys.train_only or []


def _depth_factor(name: str, num_layers: int, keys: OptimizerConfig) -> float:
    """Layer-wise decay: depth 0 is the embedding, layer i has depth i, all that follows the layers has the greatest."""
    layer, most = _LAYER.match(name), num_layers + 2
    depth = int(layer[1]) if layer else 0 if re.search(EMBEDDING, name) else most
    least = keys.layerwise_lr_decay_bound
    return least + (1.0 - least) * depth / most


def _matching(patterns: Sequence[str], names: Sequence[str], *, key: str, problems: list[str]) -> set[str]:
    """The names that any pattern is found in; patterns without a match become problems of `key`."""
    found = set[str]()
    for pattern in patterns:
        hits = {name for name in names if re.search(pattern, name)}
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            problems.append(f"{key}: {pattern!r} matches no parameter. Names near to it: {', '.join(near)}.")
        found |= hits
    return found
