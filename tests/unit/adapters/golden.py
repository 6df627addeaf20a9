"""Adapters that PEFT and ERNIEKit made, put into our model by hand: reading their folders is tested elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle
from safetensors.numpy import load_file

from erniekit.adapters.lora import add_adapters
from erniekit.adapters.targets import resolve_targets, slot
from erniekit.checkpoint.keys import columns
from erniekit.checkpoint.load import load_model
from erniekit.config.adapter import AdapterConfig
from erniekit.models.decoder import ErnieForCausalLM

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def names_of(model: ErnieForCausalLM) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def fill(model: ErnieForCausalLM, arrays: Mapping[str, np.ndarray]) -> None:
    """Put numbers into parameters by name."""
    parameters = dict(model.named_parameters())
    for name, array in arrays.items():
        assert tuple(parameters[name].shape) == array.shape, name
        parameters[name].set_value(np.ascontiguousarray(array))


def of_peft(case: str) -> tuple[ErnieForCausalLM, dict[str, np.ndarray], dict]:
    """(the model with the adapter of a case, its inputs and stored outputs, its facts)."""
    facts = json.loads((GOLDEN / "dpo" / "lora.json").read_text())["cases"][case]
    stored = load_file(GOLDEN / "dpo" / "lora.safetensors")
    model = load_model(GOLDEN / "dense" / "tied" / "pt")
    args = facts["args"]
    asked = args["target_modules"] if isinstance(args["target_modules"], list) else ["all-linear"]
    targets = resolve_targets(names_of(model), asked)
    config = AdapterConfig(args["r"], args["lora_alpha"], rslora=args.get("use_rslora", False), targets=targets)
    assert config.scaling == facts["scaling"]
    add_adapters(model, config, seed=0)
    for target in targets:
        for part in ("lora_A", "lora_B"):
            fill(model, {f"{slot(target)}.{part}": stored[f"base_model.model.{target}.{part}.weight"].T})
    given = load_file(GOLDEN / "dense" / "tied" / "inputs.safetensors")
    return model, given | {"logits": stored[f"{case}.logits"]}, facts


def of_erniekit() -> tuple[ErnieForCausalLM, dict[str, np.ndarray]]:
    """(the model with ERNIEKit's adapter, its inputs and stored outputs).

    There q|k|v and gate|up share one A: ours each start from that A and have their columns of B.
    """
    folder = GOLDEN / "paddle_real" / "lora_moe_shared"
    facts = json.loads((folder / "lora_config.json").read_text())
    stored = load_file(folder / "adapter_same_names.safetensors")
    model = load_model(GOLDEN / "paddle_real" / "moe_shared")
    config = AdapterConfig(facts["r"], facts["lora_alpha"], targets=resolve_targets(names_of(model), None))
    add_adapters(model, config, seed=0)
    for target in config.targets:
        owner, _, weight = target.replace("model.", "ernie.", 1).rpartition(".")
        if owner.endswith(".experts"):
            fused = [f"{owner}.{e}.{weight.replace('gate_up', 'up_gate')}" for e in range(8)]
            arrays = {part: np.stack([stored[f"{one}.{part}"] for one in fused]) for part in ("lora_A", "lora_B")}
        else:
            there, part_of = fused_place(model, weight)
            arrays = {part: stored[f"{owner}.{there}.{part}"] for part in ("lora_A", "lora_B")}
            arrays["lora_B"] = part_of(arrays["lora_B"])
        fill(model, {f"{slot(target)}.{part}": array for part, array in arrays.items()})
    return model, load_file(folder / "io.safetensors")


def fused_place(model: ErnieForCausalLM, weight: str):
    """(the fused module of ERNIEKit, our columns of what it has)."""
    cfg = model.config
    ends = {"q_proj": cfg.q_dim, "k_proj": cfg.q_dim + cfg.kv_dim, "v_proj": cfg.q_dim + 2 * cfg.kv_dim}
    starts = {"q_proj": 0, "k_proj": ends["q_proj"], "v_proj": ends["k_proj"]}
    if weight in ends:
        return "qkv_proj", lambda b: columns(starts[weight], ends[weight])(b).T
    if weight in ("gate_proj", "up_proj"):
        return "up_gate_proj", lambda b: np.split(b, 2, axis=-1)[weight == "up_proj"]
    return weight, lambda b: b


def logits(model: ErnieForCausalLM, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    return model(paddle.to_tensor(ids), None if mask is None else paddle.to_tensor(mask)).numpy()
