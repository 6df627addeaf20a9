"""Which weights of a model a quantised compute type packs, and how large they are."""

from __future__ import annotations

import re

import pytest

from erniekit.base.errors import ConfigError
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.config.families import family
from erniekit.config.load import load_config
from erniekit.config.packing import Packing, packing_of

HIGH = r"embed_tokens|norm|lm_head|\.gate\.weight|bias|e_score"


def kinds(name: str, compute_type: str, **changes) -> dict[str, str | None]:
    cfg = family(name).replace(**changes)
    packing = Packing(compute_type)
    return {t: packing.kind_of(t.removesuffix(".weight")) for t in memory_table(cfg, head_bias=True).tensors}


@pytest.mark.parametrize("name", ["micro-moe", "micro-dense", "0.3B", "21B-A3B"])
@pytest.mark.parametrize("compute_type", ["wint8", "wint4/8", "wint4", "nf4"])
def test_every_linear_layer_is_packed_and_nothing_else(name, compute_type):
    found = kinds(name, compute_type, num_nextn_predict_layers=1)
    for tensor, kind in found.items():
        assert (kind is None) == bool(re.search(HIGH, tensor)), tensor
    assert found["model.layers.0.self_attn.k_proj.weight"] is not None
    assert found["model.mtp_block.0.self_attn.o_proj.weight"] is not None
    assert found["model.mtp_linear_proj.0.weight"] is not None


def test_mixed_means_experts_in_4_bits_and_the_rest_in_8():
    found = kinds("micro-moe", "wint4/8")
    assert {found[name] for name in found if ".mlp.experts." in name} == {"int4"}
    assert {kind for name, kind in found.items() if ".mlp.experts." not in name} == {"int8", None}
    assert found["model.layers.1.mlp.shared_experts.up_proj.weight"] == "int8"


@pytest.mark.parametrize(
    ("compute_type", "group_size", "linear", "experts"),
    [
        ("wint8", None, 7 * 4 + 4 * 4, 3 * (6 * 4 + 4 * 4)),
        ("wint4", None, 4 * 4 + 4 * 4, 3 * (3 * 4 + 4 * 4)),
        ("wint4/8", 1, 7 * 4 + 7 * 4 * 4, 3 * (3 * 4 + 6 * 4 * 4)),
        ("nf4", 1, 4 * 4 + 7 * 4 * 4, 3 * (3 * 4 + 6 * 4 * 4)),
    ],
)
def test_bytes(compute_type, group_size, linear, experts):
    packing = Packing(compute_type, group_size)
    assert packing.num_bytes("model.layers.0.self_attn.q_proj", (7, 4)) == linear
    assert packing.num_bytes("model.layers.1.mlp.experts.down_proj", (3, 6, 4)) == experts


@pytest.mark.parametrize(
    ("keys", "packing"),
    [
        ({"compute_type": "bf16"}, None),
        ({"compute_type": "fp32", "group_size": 32}, None),
        ({"compute_type": "wint8"}, Packing("wint8")),
        ({"compute_type": "wint4/8", "group_size": 128}, Packing("wint4/8", 128)),
        ({"weight_quantize_algo": "weight_only_mix"}, Packing("wint4/8")),
        ({"compute_type": "nf4"}, Packing("nf4", 64)),
        ({"compute_type": "nf4", "group_size": -1}, Packing("nf4")),
    ],
)
def test_the_run_says_how_to_pack(keys, packing):
    assert packing_of(load_config(keys)) == packing


def test_a_group_size_that_does_not_fit_names_the_modules_and_a_way_out():
    shapes = {f"model.layers.{i}.self_attn.o_proj": (96, 48) for i in range(5)} | {"lm_head": (7, 7)}
    Packing("nf4", 32).check(shapes)
    with pytest.raises(ConfigError) as caught:
        Packing("nf4", 64).check(shapes)
    (problem,) = caught.value.problems
    assert "every 64 inputs" in problem
    assert "model.layers.0.self_attn.o_proj has 96" in problem
    assert "and 2 more" in problem
    assert "a divisor of 96" in problem


@pytest.mark.parametrize("compute_type", ["wint8", "nf4"])
def test_full_fine_tuning_of_quantised_weights_is_refused(compute_type):
    keys = {"compute_type": compute_type, "train_dataset_path": "a.jsonl"}
    with pytest.raises(ConfigError, match=rf"fine_tuning: Full .* compute_type: {compute_type} .*fine_tuning: LoRA"):
        load_config(keys)
    load_config({"compute_type": compute_type})  # for eval and chat


def test_a_group_of_no_input_is_refused():
    with pytest.raises(ConfigError, match="group_size: 0"):
        load_config({"compute_type": "nf4", "group_size": 0})
