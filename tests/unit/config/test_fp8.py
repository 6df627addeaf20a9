"""What the FP8 keys come to, and every setting and size that they refuse."""

import pytest

from erniekit.base.errors import ConfigError, MeshError
from erniekit.config.families import family
from erniekit.config.fp8 import Fp8, Qat, fp8_of
from erniekit.config.layout import layout_of
from erniekit.config.load import load_config


def settings(**keys):
    return fp8_of(load_config({"compute_type": "fp8", **keys}))


def test_nothing_without_fp8():
    config = load_config({"fp8_recipe": "qat", "apply_hadamard": True, "stage": "PT"})
    assert fp8_of(config) is None
    (text,) = [line for line in config.notices if "without effect" in line]
    assert "fp8_recipe, apply_hadamard (with compute_type: bf16)" in text


@pytest.mark.parametrize(
    ("keys", "recipe"),
    [
        ({"stage": "PT"}, "blockwise"), ({"stage": "SFT"}, "qat"), ({"stage": "DPO"}, "qat"),
        ({"stage": "PT", "apply_hadamard": True}, "qat"), ({"stage": "PT", "apply_hadamard": False}, "blockwise"),
        ({"stage": "SFT", "fp8_recipe": "blockwise"}, "blockwise"), ({"stage": "PT", "fp8_recipe": "QAT"}, "qat"),
    ],
)  # fmt: skip
def test_the_recipe_is_the_stages_unless_said(keys, recipe, tmp_path):
    found = settings(**keys)
    assert (found.recipe, found.qat is not None) == (recipe, recipe == "qat")
    config = load_config({"compute_type": "fp8", **keys})
    config.write_resolved(tmp_path / "run.yaml")
    assert fp8_of(load_config(tmp_path / "run.yaml")) == found  # a resolved file says the same


@pytest.mark.parametrize("other", [{"use_fp8": True}, {"weight_quantize_algo": "fp8linear"}, {"bf16": True}])
def test_other_names(other):
    assert settings(**other) == settings()


def test_blockwise_settings():
    keys = {"fp8_emulate": True, "fp8_check_every": 5, "enable_fp8_quantize_analysis": True}
    assert settings(stage="PT", **keys) == Fp8(
        "blockwise", ("experts", "shared_experts", "mlp"), emulate=True, check_every=5, details=True
    )
    assert settings(stage="PT", fp8_modules="experts").modules == ("experts",)


def test_qat_settings():
    assert settings().qat == Qat(
        rotate=True, quant_input_grad=False, quant_weight_grad=False, gradients="e5m2", online_steps=200,
        moving_rate=0.01, forget=False,
    )  # fmt: skip
    keys = {"apply_hadamard": False, "quant_input_grad": True, "quant_weight_grad": True, "fp8_format_type": "e4m3",
            "apply_online_actscale_step": 3, "actscale_moving_rate": 0.5, "fp8_force_clear_state": True}  # fmt: skip
    assert settings(**keys).qat == Qat(
        rotate=False, quant_input_grad=True, quant_weight_grad=True, gradients="e4m3", online_steps=3, moving_rate=0.5,
        forget=True,
    )  # fmt: skip


def test_modules_by_name():
    found = settings(stage="PT")
    layer = "model.layers.1."
    inside = ("mlp.experts", "mlp.experts.gate_up_proj", "mlp.shared_experts.down_proj", "mlp.gate_proj")
    outside = ("self_attn.q_proj", "mlp.gate", "mlp.experts.other", "input_layernorm")
    assert [found.covers(layer + name) for name in inside] == [True] * 4
    assert [found.covers(layer + name) for name in outside] == [False] * 4
    assert settings().covers(layer + "self_attn.q_proj") and not settings().covers("lm_head")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fine_tuning": "LoRA"}, ("fine_tuning: LoRA", "blockwise")),
        ({"cpu_bf16_matmul": True}, ("cpu_bf16_matmul: true",)),
        ({"sharding": "stage3"}, ("sharding: stage3", "stage2")),
        ({"fp8_recipe": "blockwise", "apply_hadamard": True}, ("fp8_recipe: blockwise", "apply_hadamard: true")),
        ({"hadamard_block_size": 64}, ("hadamard_block_size: 64", "32")),
    ],
)
def test_what_fp8_excludes(keys, words):
    with pytest.raises(ConfigError) as caught:
        settings(**keys)
    (line,) = caught.value.problems
    assert all(word in line for word in words)
    load_config({**keys, "compute_type": "bf16"})


def test_blockwise_goes_with_stage3():
    """Which keeps no copies of weights there."""
    assert settings(stage="PT", sharding="stage3").recipe == "blockwise"


# ---------------------------------------------------------------------- sizes
def misfits(arch, world=1, **keys):
    with pytest.raises(MeshError) as caught:
        layout_of(load_config({"compute_type": "fp8", **keys}), world, arch)
    return caught.value.problems


def test_a_model_that_fits():
    arch = family("tiny-moe")
    for stage in ("PT", "SFT"):
        assert layout_of(load_config({"compute_type": "fp8", "stage": stage, "tensor_parallel_degree": 2}), 2, arch)


def test_every_size_is_named_at_once():
    lines = misfits(family("micro-moe"), stage="PT")
    assert len(lines) == 5  # the MLP's width is 128
    for part, size in (("mlp.experts", 32), ("mlp.shared_experts", 32), ("mlp", 64)):
        layer = 0 if part == "mlp" else 1
        assert any(f"model.layers.{layer}.{part} in blocks of 128" in line and f" {size}, " in line for line in lines)
    layout_of(load_config({"compute_type": "fp8", "stage": "SFT"}), 1, family("micro-moe"))  # blocks of 32


def test_a_part_of_a_size_names_the_degree_and_the_way_out():
    keys = {"stage": "PT", "tensor_parallel_degree": 4}
    (line,) = misfits(family("tiny-moe"), 4, **keys)
    for words in ("model.layers.1.mlp.experts", "64 of moe_intermediate_size 256", "tensor_parallel_degree: 4",
                  "fp8_modules=[shared_experts, mlp]", "a smaller tensor_parallel_degree"):  # fmt: skip
        assert words in line
    arch, config = family("tiny-moe"), {"compute_type": "fp8", **keys}
    assert layout_of(load_config({**config, "moe_group": "mp"}), 4, arch)  # experts are shared, not cut
    assert layout_of(load_config({**config, "fp8_modules": ["shared_experts", "mlp"]}), 4, arch)


def test_rotated_inputs_may_not_straddle_devices():
    (line,) = misfits(family("micro-moe"), 2, tensor_parallel_degree=2, fp8_modules=["experts", "attention"])
    assert "model.layers.1.mlp.experts in blocks of 32" in line and "16 of moe_intermediate_size 32" in line


def test_moments_are_small_with_qat_unless_said():
    for keys, small in (({}, True), ({"use_lowprecision_moment": False}, False), ({"stage": "PT"}, False)):
        assert load_config({"compute_type": "fp8", **keys}).optimizer.use_lowprecision_moment is small


def test_the_reference_of_preferences_stands_still():
    with pytest.raises(ConfigError, match=r"ref_model_update_steps: 5.*compute_type: fp8"):
        load_config({"compute_type": "fp8", "stage": "DPO", "ref_model_update_steps": 5})
