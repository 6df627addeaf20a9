"""Which modules get an adapter, and which are trained whole: picked by the names of a model's parameters.

Works on names alone, so that a wrong pattern is told before anything is read or built. Builds nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from erniekit.base.errors import ConfigError, did_you_mean
from erniekit.config.adapter import SCORE, AdapterConfig
from erniekit.config.lora import PLUS_SCALE, RSLORA_ALPHA, LoraConfig
from erniekit.config.packing import Packing

_BLOCK = r"^model\.(layers|mtp_block)\.\d+\."
_LINEAR = re.compile(_BLOCK + r".*_proj\.weight$|^model\.mtp_linear_proj\.\d+\.weight$")
_EXPERTS = re.compile(_BLOCK + r"mlp\.experts\.(gate_up|down)_proj$")
_GROUPS = {
    "all-linear": _BLOCK + r".*_proj$",
    "attention": _BLOCK + r"self_attn\.",
    "mlp": _BLOCK + r"mlp\.(shared_experts\.)?(gate|up|down)_proj$",
    "experts": _EXPERTS.pattern,
}
FACTS = ("lora_rank", "lora_alpha", "rslora", "dora", "lora_target_modules", "modules_to_save")  # keys that shape one
_NEVER = _BLOCK + r"mlp\.moe_statics$"  # correction biases have no gradient


def possible_targets(names: Iterable[str]) -> list[str]:
    """The modules among a model's parameter names that an adapter can sit on."""
    return [name.removesuffix(".weight") for name in names if _LINEAR.search(name) or _EXPERTS.search(name)]


def resolve_targets(names: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Module paths that `asked` picks among the parameters `names`: groups, names, or regular expressions.

    None is what ERNIEKit adapts: all linear layers, routed and shared experts included. A name picks every module that
    ends with it; what is no module's name is looked for as a regular expression. Raises ConfigError for what picks
    nothing.
    """
    possible = possible_targets(names)
    return _resolve(possible, asked or ("all-linear",), key="lora_target_modules", groups=_GROUPS)


def resolve_saved(names: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Paths of the modules that are trained whole, picked by name or regular expression; a reward model's score, which
    starts at random, always is. Raises ConfigError."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    possible = [path for path in owners if not re.search(_NEVER, path)]
    picked = _resolve(possible, asked or (), key="modules_to_save", groups={})
    return (*picked, SCORE) if SCORE in possible and SCORE not in picked else picked


def adapter_config(keys: LoraConfig, names: Sequence[str]) -> AdapterConfig:
    """The adapter that a run asks for, on a model with the parameters `names`. Raises ConfigError."""
    problems: list[str] = []
    targets = _collected(lambda: resolve_targets(names, keys.lora_target_modules), problems)
    saved = _collected(lambda: resolve_saved(names, keys.modules_to_save), problems)
    twice = [path for path in saved if any(_inside(target, path) for target in targets)]
    if twice:
        problems.append(
            f"modules_to_save and lora_target_modules both name {', '.join(twice[:3])}: a module is trained whole or "
            "gets an adapter; name it in one of them"
        )
    stacked = [target for target in targets if _EXPERTS.search(target)]
    if keys.dora and stacked:
        problems.append(
            f"dora: true cannot adapt routed experts ({stacked[0]}): their weights are stacked, and no adapter format "
            "has magnitudes for that. Set lora_target_modules to [attention, mlp], or dora to false."
        )
    if problems:
        raise ConfigError(problems)
    return AdapterConfig(
        rank=keys.lora_rank, alpha=_alpha(keys), dropout=keys.lora_dropout, rslora=_rank_stabilised(keys),
        dora=keys.dora, init="pissa" if keys.lora_init == "pissa" else "default", targets=targets,
        modules_to_save=saved,
    )  # fmt: skip


def started_config(
    there: AdapterConfig, given: Mapping[str, object], names: Sequence[str], *, keys: LoraConfig
) -> AdapterConfig:
    """The adapter of a run that starts from one with the config `there`; `given` holds those of FACTS that the user
    set. Raises ConfigError where they contradict it."""
    asked: dict[str, object] = {
        "lora_rank": keys.lora_rank, "lora_alpha": _alpha(keys), "rslora": _rank_stabilised(keys), "dora": keys.dora,
    }  # fmt: skip
    found: dict[str, object] = {
        "lora_rank": there.rank, "lora_alpha": there.alpha, "rslora": there.rslora, "dora": there.dora,
    }  # fmt: skip
    if "lora_target_modules" in given:
        asked["lora_target_modules"] = sorted(resolve_targets(names, keys.lora_target_modules))
        found["lora_target_modules"] = sorted(there.targets)
    if "modules_to_save" in given:
        asked["modules_to_save"] = sorted(resolve_saved(names, keys.modules_to_save))
        found["modules_to_save"] = sorted(there.modules_to_save)
    problems = [
        f"{name}: {given[name]} contradicts the adapter in lora_path, which has {_short(found[name])}; leave {name} "
        "out to go on with that adapter, or leave lora_path out to start a new one"
        for name in FACTS
        if name in given and given[name] != -1 and asked[name] != found[name]
    ]
    if SCORE in resolve_saved(names, None) and not there.is_reward:
        problems.append(
            "lora_path: that adapter has no score, so a reward model cannot start from it; merge it into its base first"
        )
    if there.is_reward and SCORE not in resolve_saved(names, None):
        problems.append("lora_path: that adapter has the score of a reward model; only stage RM goes on with it")
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(there, dropout=keys.lora_dropout)


def _short(value: object) -> str:
    return f"{len(value)} modules ({', '.join(value[:3])} ...)" if isinstance(value, list) and value else str(value)


def b_rate(keys: LoraConfig) -> float:
    """The factor on the learning rate of the B matrices."""
    return PLUS_SCALE if keys.rslora_plus else keys.lora_plus_scale


def _rank_stabilised(keys: LoraConfig) -> bool:
    return keys.rslora or keys.rslora_plus


def _alpha(keys: LoraConfig) -> float:
    if keys.lora_alpha != -1:
        return keys.lora_alpha
    return RSLORA_ALPHA if _rank_stabilised(keys) else 2 * keys.lora_rank


def require_unpacked(config: AdapterConfig, names: Sequence[str], packing: Packing) -> None:
    """Raise ConfigError for modules that are to be trained whole and whose weights `packing` keeps in few bits."""
    packed = [module for module in possible_targets(names) if packing.kind_of(module)]
    wrong = [path for path in config.modules_to_save if any(_inside(module, path) for module in packed)]
    if wrong:
        raise ConfigError(
            f"modules_to_save names {', '.join(wrong[:3])}, whose weights compute_type {packing.compute_type} keeps in "
            "few bits and cannot train; leave them to lora_target_modules, or set compute_type to bf16"
        )


def adapter_names(config: AdapterConfig, names: Sequence[str]) -> list[str]:
    """The names of the parameters that such an adapter trains, those of whole modules included."""
    parts = ("lora_A", "lora_B", "magnitude") if config.dora else ("lora_A", "lora_B")
    made = [f"{slot(target)}.{part}" for target in config.targets for part in parts]
    return made + [name for name in names if any(_inside(name, path) for path in config.modules_to_save)]


def slot(target: str) -> str:
    """The path of the adapter of a module; the stacked weights of experts share one module (models/moe.py)."""
    return f"{target.removesuffix('_proj')}_adapter" if _EXPERTS.search(target) else f"{target}.adapter"


def slot_owner(path: str) -> str:
    """The module that the adapter of this path is of: what `slot` was given."""
    return path.removesuffix(".adapter") if path.endswith(".adapter") else path.removesuffix("_adapter") + "_proj"


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _collected(resolve: Callable[[], tuple[str, ...]], problems: list[str]) -> tuple[str, ...]:
    try:
        return resolve()
    except ConfigError as error:
        problems += error.problems
        return ()


def _resolve(possible: Sequence[str], asked: Sequence[str], *, key: str, groups: dict[str, str]) -> tuple[str, ...]:
    found, problems = set[str](), list[str]()
    for item in asked:
        hits = {path for path in possible if path == item or path.endswith(f".{item}")}
        try:
            hits = hits or {path for path in possible if re.search(groups.get(item, item), path)}
        except re.error as error:
            problems.append(f"{key}: {item!r} is neither a module's name nor a regular expression: {error}")
            continue
        if not hits:
            short = dict.fromkeys(path.rpartition(".")[2] for path in possible)
            problems.append(
                f"{key}: {item!r} matches no module of this model.{did_you_mean(item, [*groups, *short, *possible])} "
                f"There are: {', '.join([*groups, *short])}."
            )
        found |= hits
    if problems:
        raise ConfigError(problems)
    return tuple(path for path in possible if path in found)
