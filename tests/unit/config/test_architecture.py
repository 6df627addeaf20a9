"""config.json in, config.json out."""

import json
from pathlib import Path

import pytest

from erniekit.base.errors import CheckpointError
from erniekit.config.architecture import ErnieConfig

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
MOE = dict(
    model_type="ernie4_5_moe", vocab_size=160, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, moe_num_experts=8, moe_k=3, moe_intermediate_size=32,
)  # fmt: skip


def test_both_published_forms_say_the_same():
    for case in ("dense/tied", "dense/untied_bias", "moe/shared_tied", "moe/noshared_untied"):
        pt, paddle = (ErnieConfig.from_folder(GOLDEN / case / layout) for layout in ("pt", "paddle"))
        assert pt.replace(extras={}, dtype="float32") == paddle.replace(extras={}, dtype="float32")


def test_defaults_are_the_published_ones():
    cfg = ErnieConfig.from_dict(MOE)
    assert (cfg.head_dim, cfg.rope_theta, cfg.rms_norm_eps, cfg.moe_norm_min) == (12, 500000.0, 1e-5, 1e-12)
    assert cfg.moe_layers == (0, 1, 2, 3) and cfg.tie_word_embeddings


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        (dict(moe_layer_start_index=1, moe_layer_end_index=-1), (1, 2, 3)),
        (dict(moe_layer_start_index=2, moe_layer_end_index=2), (2,)),
        (dict(moe_layer_interval=2), (1, 3)),
    ],
)
def test_which_layers_are_sparse(keys, layers):
    assert ErnieConfig.from_dict({**MOE, **keys}).moe_layers == layers


def test_a_dense_model_saved_under_the_moe_type_is_dense():
    cfg = ErnieConfig.from_dict({**MOE, "moe_num_experts": 0})
    assert (cfg.model_type, cfg.is_moe, cfg.moe_layers) == ("ernie4_5", False, ())


def test_unknown_keys_are_kept_and_dtype_is_renamed():
    given = {**MOE, "dtype": "bfloat16", "moe_capacity": [64, 64, 64], "head_dim": None, "auto_map": {"a": "b"}}
    cfg = ErnieConfig.from_dict(given)
    pt, paddle = cfg.to_dict("pt"), cfg.to_dict("paddle")
    assert pt["torch_dtype"] == paddle["dtype"] == "bfloat16" and "dtype" not in pt and "torch_dtype" not in paddle
    assert pt["moe_capacity"] == [64, 64, 64] and pt["auto_map"] == {"a": "b"} and pt["head_dim"] == 12
    assert ErnieConfig.from_dict(json.loads(json.dumps(pt))).replace(extras={}) == cfg.replace(extras={})


def test_all_problems_at_once_with_the_file():
    with pytest.raises(CheckpointError) as caught:
        ErnieConfig.from_dict(
            {**MOE, "num_attention_heads": 3, "moe_k": 9, "hidden_act": "gelu"}, source="x/config.json"
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 3 and "num_key_value_heads" in text and "moe_k 9" in text and "gelu" in text
    assert all(problem.startswith("x/config.json") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(model_type="llama"), "llama"),
        (dict(hidden_size=None), "'hidden_size' is missing"),
        (dict(vocab_size="many"), "'many'"),
        (dict(rope_parameters={"rope_type": "yarn"}), "rotary"),
        (dict(dtype="int8"), "int8"),
        (dict(moe_group_experts=True), "moe_group_experts"),
    ],
)
def test_what_cannot_be_right_is_refused(change, word):
    with pytest.raises(CheckpointError, match=word):
        ErnieConfig.from_dict({**MOE, **change})


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        ErnieConfig.from_folder(tmp_path)
