"""Which modules get adapters: groups, names and patterns, what is wrong with them, and what keys make of it."""

from __future__ import annotations

import pytest

from erniekit.adapters.targets import (
    adapter_config,
    adapter_names,
    b_rate,
    require_unpacked,
    resolve_saved,
    resolve_targets,
    started_config,
)
from erniekit.base.errors import ConfigError
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.config.adapter import AdapterConfig
from erniekit.config.architecture import ErnieConfig
from erniekit.config.families import SMALL_PRESETS
from erniekit.config.load import load_config
from erniekit.config.packing import Packing

CFG = ErnieConfig.from_dict({**SMALL_PRESETS["micro-moe"], "num_nextn_predict_layers": 1})
NAMES = list(memory_table(CFG, head_bias=False).tensors)
ATTENTION = {f"self_attn.{part}_proj" for part in "qkvo"}
DENSE = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
SHARED = {f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
ROUTED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def in_layers(*groups):
    """Layer 0 is dense, the others are not; so is the prediction block."""
    blocks = {f"model.layers.{i}": ATTENTION | (SHARED | ROUTED if i else DENSE) for i in range(3)}
    blocks["model.mtp_block.0"] = ATTENTION | DENSE
    return {f"{block}.{name}" for block, names in blocks.items() for name in names if any(name in g for g in groups)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, in_layers(ATTENTION, DENSE, SHARED, ROUTED)),
        (["all-linear"], in_layers(ATTENTION, DENSE, SHARED, ROUTED)),
        (["attention"], in_layers(ATTENTION)),
        (["mlp"], in_layers(DENSE, SHARED)),
        (["experts"], in_layers(ROUTED)),
        (["attention", "experts"], in_layers(ATTENTION, ROUTED)),
        (["up_proj"], in_layers({"mlp.up_proj", "mlp.shared_experts.up_proj"})),  # a name, not a part of gate_up_proj
        (["shared_experts"], in_layers(SHARED)),
        ([r"layers\.2\..*(q|v)_proj"], {f"model.layers.2.self_attn.{part}_proj" for part in "qv"}),
        (["mtp_linear_proj.0"], {"model.mtp_linear_proj.0"}),
    ],
)
def test_what_is_picked(asked, expected):
    assert set(resolve_targets(NAMES, asked)) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["q_prog"], "lora_target_modules: 'q_prog' matches no module of this model. Did you mean 'q_proj'?"),
        (["atention"], "Did you mean 'attention'?"),
        (["mlp.gate.weight"], "There are: all-linear, attention, mlp, experts, q_proj"),  # the router is no target
        (["lm_head"], "'lm_head' matches no module"),
        (["("], "'(' is neither a module's name nor a regular expression"),
    ],
)
def test_what_picks_nothing_is_an_error(asked, said):
    with pytest.raises(ConfigError) as caught:
        resolve_targets(NAMES, ["attention", *asked])
    assert said in str(caught.value)


def test_modules_that_are_trained_whole():
    assert resolve_saved(NAMES, ["embed_tokens", "model.norm"]) == ("model.embed_tokens", "model.norm")
    assert resolve_saved(NAMES, ["mlp.gate"]) == ("model.layers.1.mlp.gate", "model.layers.2.mlp.gate")
    for wrong in ("moe_statics", "lm_heat"):
        with pytest.raises(ConfigError, match=f"modules_to_save: '{wrong}' matches no module"):
            resolve_saved(NAMES, [wrong])


def keys(**values):
    return load_config({"fine_tuning": "LoRA", **values}).lora


def test_weights_in_few_bits_cannot_be_trained_whole():
    packing = Packing("wint4/8")
    require_unpacked(adapter_config(keys(modules_to_save=["embed_tokens", "mlp.gate"]), NAMES), NAMES, packing)
    for path, targets in (("layers.0.self_attn.q_proj", "mlp"), ("layers.1.mlp.experts", "attention")):
        config = adapter_config(keys(modules_to_save=[path], lora_target_modules=[targets]), NAMES)
        with pytest.raises(ConfigError, match=f"modules_to_save names model.{path}, .* compute_type wint4/8"):
            require_unpacked(config, NAMES, packing)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        adapter_config(keys(lora_target_modules=["q_proj", "nothing"], modules_to_save=["nowhere"], dora=True), NAMES)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError) as caught:
        adapter_config(keys(modules_to_save=["q_proj"], dora=True), NAMES)
    twice, experts = caught.value.problems
    assert "modules_to_save and lora_target_modules both name model.layers.0.self_attn.q_proj" in twice
    assert "dora: true cannot adapt routed experts (model.layers.1.mlp.experts.gate_up_proj)" in experts


@pytest.mark.parametrize(
    ("given", "alpha", "scaling", "rate"),
    [
        ({}, 16, 2.0, 1.0),
        ({"lora_rank": 4, "lora_alpha": 2}, 2, 0.5, 1.0),
        ({"rslora": True, "lora_rank": 16}, 4, 1.0, 1.0),
        ({"rslora": True, "lora_rank": 16, "lora_alpha": 8}, 8, 2.0, 1.0),
        ({"rslora_plus": True, "lora_rank": 64}, 4, 0.5, 4.0),
        ({"lora_plus_scale": 16}, 16, 2.0, 16.0),
    ],
)
def test_scales(given, alpha, scaling, rate):
    config = adapter_config(keys(**given), NAMES)
    assert (config.alpha, config.scaling, b_rate(keys(**given))) == (alpha, scaling, rate)


def test_names_of_what_is_trained():
    config = AdapterConfig(
        4, 8, targets=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.down_proj"),
        modules_to_save=("model.norm",), dora=True,
    )  # fmt: skip
    assert adapter_names(config, NAMES) == [
        *(f"model.layers.0.self_attn.q_proj.adapter.{part}" for part in ("lora_A", "lora_B", "magnitude")),
        *(f"model.layers.1.mlp.experts.down_adapter.{part}" for part in ("lora_A", "lora_B", "magnitude")),
        "model.norm.weight",
    ]


def test_a_run_that_starts_from_an_adapter_takes_what_that_says():
    there = AdapterConfig(4, 8, targets=resolve_targets(NAMES, ["attention"]))
    found = started_config(there, {}, NAMES, keys=keys(lora_dropout=0.1))
    assert (found.rank, found.alpha, found.targets, found.dropout) == (4, 8, there.targets, 0.1)
    same = {"lora_rank": 4, "lora_alpha": -1, "lora_target_modules": ["attention"]}
    started_config(there, same, NAMES, keys=keys(**same))
    other = {"lora_rank": 16, "rslora": True, "lora_target_modules": ["mlp"]}
    with pytest.raises(ConfigError) as caught:
        started_config(there, other, NAMES, keys=keys(**other))
    lines = caught.value.problems
    assert len(lines) == 3 and "lora_rank: 16 contradicts the adapter in lora_path, which has 4" in lines[0]
