"""The map itself: it tiles every tensor, agrees with published counts, and tells layouts and forms apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.ernie45 import Form, is_mtp, layout_of, layout_table
from erniekit.config.architecture import ErnieConfig
from erniekit.config.families import FAMILIES, family

TEXT = dict(
    model_type="ernie4_5_moe", vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, moe_num_experts=3, moe_k=2, moe_intermediate_size=8,
    moe_num_shared_experts=2, moe_layer_start_index=1,
)  # fmt: skip
VL = TEXT | dict(
    model_type="ernie4_5_moe_vl", moe_num_experts=[3, 3], moe_intermediate_size=[8, 4], moe_layer_start_index=[1, 1],
    moe_layer_end_index=[29, 28], pixel_hidden_size=8,
    vision_config=dict(depth=2, embed_dim=8, patch_size=2, in_channels=3, mlp_ratio=2, num_heads=2),
)  # fmt: skip
CASES = {
    "gqa": TEXT,
    "mha": TEXT | dict(num_key_value_heads=4),
    "untied with biases": TEXT | dict(tie_word_embeddings=False, use_bias=True),
    "mha with biases": TEXT | dict(num_key_value_heads=4, use_bias=True, head_dim=6),
    "every second layer": TEXT | dict(moe_layer_interval=2, moe_layer_start_index=0, moe_num_shared_experts=0),
    "dense": {key: value for key, value in TEXT.items() if "moe" not in key} | {"model_type": "ernie4_5"},
    "vision": VL,
    "vision, no temporal layer": VL | dict(use_temporal_conv=False, tie_word_embeddings=False),
}


def config(name: str) -> ErnieConfig:
    return ErnieConfig.from_dict(CASES[name])


def forms(cfg: ErnieConfig, layout: str) -> list[Form]:
    usual = Form.usual(cfg, layout)
    changed = [dict(mtp_layers=2, mtp_rows=True), dict(mtp_layers=1, mtp_rows=False), dict(correction_bias=False)]
    changed += [dict(head_bias=True, head_rows=False), dict(head_rows=True)]
    changed += [] if usual.head else [dict(head_copy=True), dict(head_copy=True, head_rows=False)]
    return [usual, *(dataclasses.replace(usual, **change) for change in changed)]


@pytest.mark.parametrize("layout", ["pt", "paddle", "ram"])
@pytest.mark.parametrize("name", CASES)
def test_atoms_tile_every_tensor_exactly(name, layout):
    cfg = config(name)
    if cfg.is_vl and layout == "ram":
        return
    for form in forms(cfg, layout):
        table = layout_table(cfg, layout, form)
        for tensor_name, tensor in table.tensors.items():
            covered = np.zeros(tensor.shape, int)
            for atom, view in tensor.parts:
                seen = view(covered)
                assert np.may_share_memory(seen, covered)
                assert seen.size == np.prod(table.atoms[atom].shape)
                seen += 1
            assert (covered == 1).all(), tensor_name
        assert table.atoms.keys() == table.places.keys()


@pytest.mark.parametrize("name", CASES)
def test_all_layouts_hold_the_same_atoms(name):
    cfg = config(name)
    layouts = ("pt", "paddle") if cfg.is_vl else ("pt", "paddle", "ram")
    pt, *others = (layout_table(cfg, layout, Form.usual(cfg, layout, mtp_layers=1)).atoms for layout in layouts)
    for other in others:
        assert other == pt


def test_tensor_counts_of_published_models():
    """Counts of real dumps: 3,680 (21B -Paddle without multi-token prediction), 6,855 (300B), 5,492 + 12 (21B -PT)."""

    def count(name: str, layout: str, mtp: int) -> int:
        return len(layout_table(family(name), layout, Form.usual(family(name), layout, mtp_layers=mtp)).tensors)

    assert count("21B-A3B", "paddle", 0) == 3680
    assert count("300B-A47B", "paddle", 0) == 6855
    assert count("21B-A3B", "pt", 0) == 5492
    assert count("21B-A3B", "pt", 1) == 5492 + 12


def test_names_and_shapes_of_the_21b():
    cfg = family("ERNIE-4.5-21B-A3B")
    tensors = layout_table(cfg, "paddle", Form.usual(cfg, "paddle", mtp_layers=1)).tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layer = "ernie.layers.5."
    assert shapes[layer + "self_attn.qkv_proj.weight"] == (2560, 3584)
    assert shapes["ernie.layers.0.mlp.up_gate_proj.weight"] == (2560, 24576)
    assert shapes[layer + "mlp.experts.63.up_gate_proj.weight"] == (2560, 3072)
    assert shapes[layer + "mlp.experts.63.down_proj.weight"] == (1536, 2560)
    assert shapes[layer + "mlp.shared_experts.up_gate_proj.weight"] == (2560, 6144)
    assert shapes[layer + "mlp.gate.weight"] == (2560, 64)
    assert shapes[layer + "mlp.moe_statics.e_score_correction_bias"] == (1, 64)
    assert shapes["ernie.mtp_linear_proj.0.weight"] == (5120, 2560)
    assert shapes["ernie.mtp_block.0.mlp.down_proj.weight"] == (12288, 2560)  # dense, as layer 0
    assert "lm_head.weight" not in shapes


def test_memory_layout_is_the_documented_one():
    cfg = config("untied with biases")
    form = dataclasses.replace(Form.usual(cfg, "ram", mtp_layers=1), head_bias=True)
    shapes = {name: tensor.shape for name, tensor in layout_table(cfg, "ram", form).tensors.items()}
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": (48, 16), layer + "self_attn.q_proj.weight": (16, 16),
        layer + "self_attn.k_proj.weight": (16, 8), layer + "self_attn.k_proj.bias": (8,),
        layer + "self_attn.o_proj.weight": (16, 16), "model.layers.0.mlp.gate_proj.weight": (16, 24),
        "model.layers.0.mlp.down_proj.weight": (24, 16), layer + "mlp.gate.weight": (16, 3),
        layer + "mlp.moe_statics.e_score_correction_bias": (1, 3), layer + "mlp.experts.gate_up_proj": (3, 16, 16),
        layer + "mlp.experts.down_proj": (3, 8, 16), layer + "mlp.shared_experts.up_proj.weight": (16, 16),
        "model.mtp_linear_proj.0.weight": (32, 16), "lm_head.weight": (16, 48), "lm_head.bias": (48,),
    }  # fmt: skip
    assert {name: shapes.get(name) for name in expected} == expected


def test_vision_models_are_not_loaded_into_memory_yet():
    with pytest.raises(CheckpointError, match="vision-language"):
        layout_table(config("vision"), "ram", Form.usual(config("vision"), "pt"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_the_layout_and_form_are_found_again_from_names_and_shapes(name, layout):
    cfg = family(name)
    for form in (
        Form.usual(cfg, layout, mtp_layers=cfg.num_nextn_predict_layers),
        dataclasses.replace(Form.usual(cfg, layout), head_bias=True, correction_bias=not cfg.is_moe),
    ):
        shapes = {name: tensor.shape for name, tensor in layout_table(cfg, layout, form).tensors.items()}
        assert layout_of(shapes, "x") == layout
        assert Form.found(cfg, layout, shapes) == form


def test_a_head_beside_a_tied_embedding_is_a_copy_in_text_models_and_its_own_in_vision_models():
    shapes = {"lm_head.weight": (48, 16)}
    text, vision = (Form.found(config(name), "paddle", shapes) for name in ("gqa", "vision"))
    assert (text.head, text.head_copy) == (False, True)
    assert (vision.head, vision.head_copy) == (True, False)


def test_the_orientation_of_mtp_linear_proj_in_pt_is_told_by_its_shape():
    for shape, rows in (((32, 16), True), ((16, 32), False)):
        assert Form.found(config("gqa"), "pt", {"model.mtp_linear_proj.0.weight": shape}).mtp_rows is rows


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", "PaddleFormers"),
        ("model.layers.0.mlp.up_gate_proj.weight", "PaddleFormers"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "nested"),
        ("transformer.h.0.attn.weight", "none of its 2 tensors"),
    ],
)
def test_other_layouts_are_refused_by_name(name, words):
    with pytest.raises(CheckpointError, match=words):
        layout_of([name, "lm_head.weight"], "somewhere")


def test_mtp_names():
    assert is_mtp("model.mtp_block.0.mlp.down_proj.weight")
    assert is_mtp("ernie.mtp_emb_norm.0.weight")
    assert not is_mtp("model.layers.0.mlp.down_proj.weight")
