"""Which weight gets which format, what config.json says of it, and what is refused."""

from __future__ import annotations

import pytest

from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.quantised import FORMATS, QUANTIZATION, Scheme, format_of, input_scale
from erniekit.config.architecture import ErnieConfig
from erniekit.config.families import family

BIG = family("ERNIE-4.5-300B-A47B")
DENSE = family("ERNIE-4.5-0.3B")
KEPT = (
    "ernie.embed_tokens.weight", "lm_head.weight", "ernie.norm.weight", "ernie.layers.5.mlp.gate.weight",
    "ernie.layers.5.input_layernorm.weight", "ernie.layers.5.self_attn.o_proj.bias",
    "ernie.layers.5.mlp.moe_statics.e_score_correction_bias", "ernie.mtp_emb_norm.0.weight",
)  # fmt: skip
ATTENTION, EXPERT = "ernie.layers.{}.self_attn.qkv_proj.weight", "ernie.layers.{}.mlp.experts.63.up_gate_proj.weight"
SHARED, MLP = "ernie.layers.{}.mlp.shared_experts.down_proj.weight", "ernie.layers.{}.mlp.up_gate_proj.weight"
MTP = "ernie.mtp_linear_proj.0.weight"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_linear_layer_stays(name):
    for cfg in (BIG, DENSE):
        scheme = Scheme.new(name, cfg)
        assert [tensor for tensor in KEPT if scheme.kind_of(tensor)] == []


@pytest.mark.parametrize(
    ("name", "dense", "first", "last"),
    [
        ("wint8", "wint8", "wint8", "wint8"),
        ("wint4", "wint4", "wint4", "wint4"),
        ("w4a8", "wint8", "w4a8", "w4a8"),
        ("w4a8c8", "wint8", "w4a8", "w4a8"),
        ("fp8", "fp8", "fp8", "fp8"),
        ("wint2", "wint8", "wint4", "wint2"),
        ("wint2.5", "wint8", "wint4", "wint2.5"),
    ],
)
def test_every_module_has_a_kind(name, dense, first, last):
    scheme = Scheme.new(name, BIG)
    for layer in (0, 30, 53):
        assert {scheme.kind_of(tensor.format(layer)) for tensor in (ATTENTION, SHARED, MLP)} == {dense}
    assert scheme.kind_of(MTP) == dense
    assert [scheme.kind_of(EXPERT.format(layer)) for layer in (6, 7, 53)] == [first, last, last]


def test_a_model_without_experts_has_its_mlps_in_their_place():
    scheme = Scheme.new("wint2", DENSE)
    assert [scheme.kind_of(MLP.format(layer)) for layer in (0, 1, 2, 17)] == ["wint4", "wint4", "wint2", "wint2"]
    assert scheme.kind_of(ATTENTION.format(0)) == "wint8"


@pytest.mark.parametrize(("layers", "early"), [(54, 7), (28, 4), (18, 2), (3, 1), (1, 1)])
def test_the_published_share_of_layers_is_int4(layers, early):
    assert Scheme.new("wint2", BIG.replace(num_hidden_layers=layers)).int4_layers == early
    assert Scheme.new("wint2", BIG.replace(num_hidden_layers=layers), int4_layers=0).int4_layers == 0


def test_fp8_by_blocks_when_asked():
    scheme = Scheme.new("fp8", BIG, group_size=128)
    assert scheme.kind_of(EXPERT.format(9)) == "fp8_blocks" and not scheme.needs_text
    assert Scheme.new("fp8", BIG).needs_text and Scheme.new("w4a8c8", BIG).needs_text
    assert not Scheme.new("wint2", BIG).needs_text and Scheme.new("wint2", BIG).wants_text


def test_settings_are_those_that_are_published():
    """docs/quantization/wint2.md of FastDeploy, of ERNIE-4.5-300B-A47B-2Bits-Paddle."""
    settings = Scheme.new("wint2", BIG).settings()
    assert {key: settings[key] for key in ("quantization", "dense_quant_type", "moe_quant_type")} == {
        "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
    }  # fmt: skip
    assert settings["moe_quant_config"] == {
        "moe_w4_quant_config": {
            "quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64,
            "quant_start_layer": 7, "quant_end_layer": 53,
        },
    }  # fmt: skip
    mixed = Scheme.new("w4a8c8", BIG).settings()
    assert (mixed["quantization"], mixed["dense_quant_type"], mixed["moe_quant_type"]) == ("mix_quant", "wint8", "w4a8")
    assert mixed["kv_cache_quant_type"] == "int8" and mixed["is_permuted"] is False
    assert Scheme.new("wint8", BIG).settings()["quantization"] == "wint8"


@pytest.mark.parametrize("name", FORMATS)
def test_a_scheme_is_found_again(name):
    group_size = {"wint4": 64, "fp8": 128}.get(name)
    int4_layers = 3 if name.startswith("wint2") else None
    scheme = Scheme.new(name, BIG, group_size=group_size, int4_layers=int4_layers)
    assert Scheme.found({QUANTIZATION: scheme.settings()}, BIG, where="x") == scheme


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization": "wint8", "is_quantized": True}, "another tool"),
        ({"erniekit": {"version": 2, "format": "wint8"}}, "another version"),
        ({"erniekit": {"version": 1, "format": "wint9"}}, "another version"),
        ({"erniekit": {"version": 1, "format": "wint8", "group_size": "many"}}, "damaged"),
        (["wint8"], "another tool"),
    ],
)
def test_settings_of_others_are_refused(settings, said):
    with pytest.raises(CheckpointError, match=said):
        Scheme.found({QUANTIZATION: settings}, BIG, where="x")


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("wint42", {}, "Did you mean 'wint4'"),
        ("w4a8", {"group_size": 64}, "--group-size is for wint8, wint4, fp8"),
        ("wint4", {"group_size": 1}, "at least 2"),
        ("fp8", {"group_size": 64}, "128"),
        ("wint8", {"int4_layers": 3}, "--int4-layers is for wint2"),
        ("wint2", {"int4_layers": 55}, "the model has 54 layers"),
        ("wint2", {"search": "long"}, "wint2 has fast and full"),
        ("wint2.5", {"search": "fast"}, "other formats have one search"),
    ],
)
def test_what_does_not_go_together_is_refused(name, keys, said):
    with pytest.raises(ConfigError, match=said):
        Scheme.new(name, BIG, **keys)


def test_the_search_is_the_encoder_s_and_not_the_folder_s():
    name = EXPERT.format(53)
    fast, full = Scheme.new("wint2", BIG, search="fast"), Scheme.new("wint2", BIG)
    assert fast.encoder_of(name).effort.books < full.encoder_of(name).effort.books
    assert fast.settings() == full.settings()


def test_all_weights_that_a_group_does_not_fit_are_named():
    cfg = ErnieConfig.from_dict({**DENSE.to_dict("paddle")})
    scheme = Scheme.new("wint4", cfg, group_size=48)
    shapes = {MLP.format(0): (100, 8), ATTENTION.format(1): (96, 8), "ernie.norm.weight": (100,)}
    with pytest.raises(ConfigError, match="1 weights") as caught:
        scheme.check(shapes)
    assert "ernie.layers.0.mlp.up_gate_proj.weight has 100; wint4 takes a multiple of 48" in str(caught.value)
    with pytest.raises(ConfigError, match=r"2 weights\. Leave --group-size 128 out"):
        Scheme.new("fp8", cfg, group_size=128).check(shapes)


def test_scales_of_inputs():
    assert input_scale("w4a8", 3.0).tolist() == [3.0]
    assert input_scale("fp8", 448.0).tolist() == [1.0]
    assert input_scale("fp8", 0.0).tolist() == [1.0]
    assert format_of("wint8").name == "wint8"
