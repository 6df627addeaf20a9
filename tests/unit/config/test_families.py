"""Families: published names and figures; the closed-form counts against the checkpoint map, without allocating."""

from __future__ import annotations

import math

import pytest

from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.ernie45 import Form, layout_table
from erniekit.config.architecture import ErnieConfig
from erniekit.config.families import (
    FAMILIES,
    count_active_parameters,
    count_parameters,
    family,
    family_name,
    flops_per_token,
)
from erniekit.config.sizes import VisionSizes, expert_groups


@pytest.mark.parametrize(
    ("name", "with_mtp", "without", "active"),
    [
        ("0.3B", 0.361, 0.361, 0.255),
        ("21B-A3B", 21.949, 21.825, 3.09),
        ("300B-A47B", 300.47, 299.48, 46.2),
        ("VL-28B-A3B", 29.664, 29.664, 3.09),
        ("VL-424B-A47B", 423.5, 423.5, 46.2),
    ],
)
def test_published_figures_in_billions(name, with_mtp, without, active):
    cfg = family(name)
    places = len(str(with_mtp).split(".")[1])
    assert round(count_parameters(cfg) / 1e9, places) == with_mtp
    assert round(count_parameters(cfg.replace(num_nextn_predict_layers=0)) / 1e9, places) == without
    assert round(count_active_parameters(cfg) / 1e9, len(str(active).split(".")[1])) == active


def test_parameters_outside_embedding_and_head_of_the_300b():
    """The published 47B lies between the count without (46.2) and with embedding and head (47.9)."""
    cfg = family("300B-A47B")
    assert round((count_active_parameters(cfg) + 2 * cfg.vocab_size * cfg.hidden_size) / 1e9, 1) == 47.9


VARIANTS = {
    "as it is": {},
    "biases": {"use_bias": True},
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "two multi-token blocks": {"num_nextn_predict_layers": 2},
    "no shared experts, every second layer": {"moe_num_shared_experts": 0, "moe_layer_interval": 2},
    "all layers sparse": {"moe_layer_start_index": 0, "num_nextn_predict_layers": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_closed_form_equals_the_sum_over_atoms(name, variant):
    cfg = family(name).replace(**VARIANTS[variant])
    table = layout_table(cfg, "pt", Form.usual(cfg, "pt", mtp_layers=cfg.num_nextn_predict_layers))
    assert count_parameters(cfg) == sum(math.prod(atom.shape) for atom in table.atoms.values())


def test_active_parameters_are_those_that_a_token_meets():
    cfg = family("tiny-moe")
    table = layout_table(cfg, "pt", Form.usual(cfg, "pt"))
    unseen = [f".experts.{i}." for i in range(cfg.moe_k, cfg.moe_num_experts)] + ["embed_tokens", "moe_statics"]
    met = [atom.shape for name, atom in table.atoms.items() if not any(part in name for part in unseen)]
    assert count_active_parameters(cfg) == sum(map(math.prod, met))


def test_flops_are_six_per_parameter_and_causal_attention():
    cfg = family("tiny-dense")
    head = cfg.vocab_size * cfg.hidden_size
    matmuls = 6 * (count_active_parameters(cfg) + head)
    # Forward: scores and weighted values, 2 multiply-adds per channel and key; causal: half; backward: twice more.
    attention = 3 * cfg.num_hidden_layers * (2 * 2 * cfg.q_dim * 1024) // 2
    assert flops_per_token(cfg, 1024) == matmuls + attention
    more = flops_per_token(cfg.replace(num_nextn_predict_layers=1), 1024) - flops_per_token(cfg, 1024)
    assert more > 6 * head


def test_the_benchmark_preset_is_the_agreed_one():
    cfg = family("bench-moe")
    agreed = dict(
        hidden_size=256, num_hidden_layers=4, intermediate_size=1024, moe_num_experts=8, moe_k=2,
        moe_intermediate_size=256, moe_num_shared_experts=1, vocab_size=8192, tie_word_embeddings=True,
    )  # fmt: skip
    assert {key: getattr(cfg, key) for key in agreed} == agreed
    assert cfg.moe_layers == (1, 2, 3)


def test_presets_have_their_promised_sizes():
    assert 9e6 < count_parameters(family("tiny-moe")) < 11e6
    assert family("tiny-moe").vocab_size == 8192
    for name in ("micro-moe", "micro-dense"):
        assert 1e5 <= count_parameters(family(name)) < 2e5


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("0.3B", "ERNIE-4.5-0.3B"),
        ("ERNIE-4.5-0.3B-Base-PT", "ERNIE-4.5-0.3B"),
        ("baidu/ERNIE-4.5-21B-A3B-Base-Paddle", "ERNIE-4.5-21B-A3B"),
        ("ernie-4.5-21b-a3b-thinking", "ERNIE-4.5-21B-A3B-Thinking"),
        ("300B-A47B-Paddle", "ERNIE-4.5-300B-A47B"),
        ("ERNIE-4.5-VL-28B-A3B-Base-PT", "ERNIE-4.5-VL-28B-A3B"),
        ("tiny-moe", "tiny-moe"),
    ],
)
def test_families_under_all_their_names(given, key):
    assert family_name(given) == key


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown family 'ERNIE-4.5-3B'.*Did you mean 'ERNIE-4.5-0.3B'"):
        family("ERNIE-4.5-3B")


def test_pairs_belong_to_vision_models_only():
    cfg = family("21B-A3B")
    with pytest.raises(CheckpointError, match="ernie4_5_moe_vl"):
        expert_groups(cfg.replace(moe_num_experts=(64, 64)))
    assert expert_groups(family("VL-28B-A3B")) == ((64, 1536), (64, 512))


def test_a_vision_config_that_lacks_sizes_names_them():
    values = {key: value for key, value in FAMILIES["ERNIE-4.5-VL-28B-A3B"].items() if key != "pixel_hidden_size"}
    values["vision_config"] = {"depth": 32}
    with pytest.raises(
        CheckpointError, match=r"vision_config\.embed_dim, vision_config\.patch_size, pixel_hidden_size"
    ):
        VisionSizes.of(ErnieConfig.from_dict(values))
