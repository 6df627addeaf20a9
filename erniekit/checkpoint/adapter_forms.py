"""The two forms in which adapters are stored: what PEFT and what ERNIEKit write into their config and how they name
tensors.

    peft      adapter_config.json, adapter_model.safetensors: `base_model.model.<module>.lora_A.weight` [rank, in],
              `.lora_B.weight` [out, rank], `.lora_magnitude_vector` [out]; stacked experts (`target_parameters`)
              `<mlp.experts>.base_layer` for gate_up_proj and `<mlp.experts>` for down_proj, A [experts x rank, in],
              B [out, rank x experts] with experts fastest
    erniekit  lora_config.json, lora_model_state.pdparams or peft_model*.safetensors: `ernie.<module>.lora_A`
              [in, rank], `.lora_B` [rank, out], q|k|v and gate|up fused

A setting that we cannot follow is refused by name. Works on names and settings; reads no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erniekit.base.errors import CheckpointError, listed

Form = Literal["peft", "erniekit"]
CONFIG_FILES: dict[Form, str] = {"peft": "adapter_config.json", "erniekit": "lora_config.json"}
PEFT_WEIGHTS = "adapter_model.safetensors"
ERNIEKIT_PICKLE = "lora_model_state.pdparams"
ERNIEKIT_INDEX = "peft_model.safetensors.index.json"
PEFT_PREFIX = "base_model.model."

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_STACK = re.compile(r"(?P<experts>.+\.mlp\.experts)(?P<inner>\.base_layer)?")
_ROUTER_BIAS = ".mlp.gate.moe_statics."
# What these keys say is followed, is about other software or speed, or is said by the tensors' names as well.
_PEFT_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern",
    "target_parameters", "modules_to_save", "base_model_name_or_path", "bias", "init_lora_weights",
}  # fmt: skip
_PEFT_IDLE = {
    "task_type", "auto_mapping", "revision", "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
_ERNIEKIT_READ = {"r", "lora_alpha", "rslora", "lora_dropout", "base_model_name_or_path"}
_ERNIEKIT_IDLE = {
    "scaling", "target_modules", "trainable_modules", "dtype", "head_dim", "lora_plus_scale", "merge_weights",
    "lorapro", "use_quick_lora", "tensor_parallel_degree", "tensor_model_parallel_size", "use_intermediate_api",
    "pipeline_model_parallel_size",
}  # fmt: skip
# Starts that change the base beside the adapter: without that base the adapter means something else.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "lora-ga")


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return any((Path(path) / name).is_file() for name in CONFIG_FILES.values())


@dataclass(frozen=True)
class Settings:
    """What the config file of an adapter says."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    base_name: str | None
    ranks: Mapping[str, int]  # patterns of modules with a rank of their own
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]  # PEFT's target_parameters
    tied: bool = False  # PEFT's ensure_weight_tying: the head is saved as a second copy of the embedding

    def rank_of(self, module: str) -> int:
        """The rank at a module."""
        return self.ranks.get(_pattern(self.ranks, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor on A B at a module."""
        alpha, rank = self.alphas.get(_pattern(self.alphas, module), self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _pattern(patterns: Collection[str], module: str) -> str:
    """The first pattern that a module's path ends in, as PEFT looks for it."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def read_settings(form: Form, values: Any, where: str) -> Settings:
    """The settings of a config file (parsed JSON); raises CheckpointError for everything that cannot be followed."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: is not a table of settings.")
    problems = _refused(form, values, where)
    rslora = values.get("use_rslora" if form == "peft" else "rslora") or False
    found = Settings(
        rank=values.get("r", 8), alpha=values.get("lora_alpha", 8), rslora=rslora, dora=bool(values.get("use_dora")),
        dropout=values.get("lora_dropout") or 0.0, base_name=values.get("base_model_name_or_path"),
        ranks=values.get("rank_pattern") or {}, alphas=values.get("alpha_pattern") or {},
        parameters=tuple(values.get("target_parameters") or ()), tied=bool(values.get("ensure_weight_tying")),
    )  # fmt: skip
    problems += [
        f"{where}: rank {rank!r} is not a whole number above 0."
        for rank in (found.rank, *found.ranks.values())
        if type(rank) is not int or rank < 1
    ]
    problems += [
        f"{where}: lora_alpha {alpha!r} is not a number above 0."
        for alpha in (found.alpha, *found.alphas.values())
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf
    ]
    for pattern in (*found.ranks, *found.alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{where}: '{pattern}' is not a regular expression ({error}).")
    if problems:
        raise CheckpointError(listed(problems))
    return found


def _refused(form: Form, values: Mapping[str, Any], where: str) -> list[str]:
    known = _PEFT_READ | _PEFT_IDLE if form == "peft" else _ERNIEKIT_READ | _ERNIEKIT_IDLE
    problems = [
        f"{where}: {name}: {value!r} cannot be represented here; without it the adapter would compute something else."
        for name, value in values.items()
        if name not in known and value not in (None, False, "", [], {})
    ]
    if form == "erniekit":
        return problems
    if values.get("peft_type", "LORA") != "LORA":
        problems.append(f"{where}: peft_type {values['peft_type']!r} is not LORA, the one kind of adapter read here.")
    if values.get("bias", "none") != "none":
        problems.append(f"{where}: bias: {values['bias']!r}: trained biases beside LoRA are not read.")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        problems.append(
            f"{where}: init_lora_weights: '{start}' changed the base model, too. Save the adapter in PEFT with "
            "path_initial_model_for_weight_conversion=..., which makes it a plain one."
        )
    return problems


# ---------------------------------------------------------------------- names
@dataclass
class Named:
    """Tensor names of a folder, sorted: by module (a -PT path, fused or stacked as the form has it) and part; whole
    parameters by -PT name; and what is neither."""

    parts: dict[str, dict[str, str]]
    whole: dict[str, str]
    strange: list[str]


def sort_names(form: Form, names: Collection[str], settings: Settings) -> Named:
    """Sort the tensor names of an adapter folder."""
    found = Named({}, {}, [])
    prefix = PEFT_PREFIX if form == "peft" else "ernie."
    for name in sorted(names):
        if name.startswith(("lm_head.", "score.")) and form == "erniekit":
            found.whole[name] = name
            continue
        path = name.removeprefix(prefix)
        match = _PART.fullmatch(path)
        if path == name or (".lora_" in path and match is None):
            found.strange.append(name)
            continue
        path = path if form == "peft" else "model." + path
        if match is None:
            found.whole[path.replace(_ROUTER_BIAS, ".mlp.moe_statics.")] = name
        else:
            module = match["module"] if form == "peft" else "model." + match["module"]
            found.parts.setdefault(module, {})[match["part"]] = name
    if form == "peft":
        found.parts = _unstacked(found.parts, settings)
    return found


def _unstacked(parts: dict[str, dict[str, str]], settings: Settings) -> dict[str, dict[str, str]]:
    """PEFT's wrappers around stacked experts under the names of the parameters that they adapt."""
    named = {}
    for module, entry in parts.items():
        stack = _STACK.fullmatch(module)
        if stack is None:
            named[module] = entry
            continue
        experts = stack["experts"]
        if stack["inner"] or f"{experts}.base_layer" in parts:
            name = "gate_up_proj" if stack["inner"] else "down_proj"
        else:
            ends = {path.rpartition(".")[2] for path in settings.parameters} & {"gate_up_proj", "down_proj"}
            name = ends.pop() if len(ends) == 1 else "?"
        named[f"{experts}.{name}"] = entry
    return named


def peft_config(settings: Mapping[str, Any], *, base: str, is_reward: bool) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    return {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": base, "bias": "none",
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "lora_bias": False,
        "peft_type": "LORA", "rank_pattern": {}, "revision": None, "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "trainable_token_indices": None, **settings,
    }  # fmt: skip


def erniekit_config(settings: Mapping[str, Any], *, base: str) -> dict[str, Any]:
    """lora_config.json as ERNIEKit writes it."""
    return {
        "base_model_name_or_path": base, "do_qat": False, "enable_lora_list": None, "head_dim": None,
        "lora_plus_scale": 1.0, "lora_use_mixer": False, "loraga": False, "lorapro": False, "merge_weights": False,
        "pissa": False, "tensor_parallel_degree": 1, "trainable_bias": None, "use_mora": False,
        "use_quick_lora": False, **settings,
    }  # fmt: skip
