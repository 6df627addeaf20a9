"""Opening and judging folders: every bad input of a user gives one clear CheckpointError, every exception a notice."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.folder import Folder

NORM = "model.layers.1.post_attention_layernorm.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


def judged(folder) -> list[str]:
    """The problems that opening and checking find."""
    with pytest.raises(CheckpointError) as error:
        Folder.open(folder).check()
    return error.value.problems


# ---------------------------------------------------------------------- sound folders
@pytest.mark.parametrize("family", ["micro-moe", "micro-dense"])
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_a_sound_folder(model, family, layout):
    folder = Folder.open(model(family, layout=layout))
    folder.check()
    assert folder.layout == layout
    assert folder.notices == []
    assert not folder.has_mtp
    assert folder.read_atom("model.layers.0.self_attn.q_proj.weight").shape == (64, 64)
    assert folder.read("model.layers.0.self_attn.k_proj.weight").shape == (2, 16, 64)


def test_a_dense_model_saved_under_the_moe_type_is_dense(golden):
    folder = Folder.open(golden / "paddle_real" / "dense_tied")
    assert json.loads(folder.config_json)["model_type"] == "ernie4_5_moe"
    folder.check()
    assert not folder.config.is_moe


def test_the_format_of_weights_without_a_dtype_in_config_json(golden):
    assert Folder.open(golden / "paddle_real" / "dense_tied").config.dtype == "float32"
    assert Folder.open(golden / "paddle_real" / "dense_tied_bf16_u16").config.dtype == "bfloat16"


def test_bfloat16_is_read_the_same_under_both_tags(golden):
    embedding = "model.embed_tokens.weight"
    arrays = []
    for case in ("moe_shared_bf16_sharded", "moe_shared"):
        folder = Folder.open(golden / "paddle_real" / case)
        arrays.append(folder.read_atom(embedding))
    bf16, fp32 = arrays
    assert str(bf16.dtype) == "bfloat16"
    np.testing.assert_array_equal(bf16, fp32.astype(bf16.dtype))


def test_a_pdparams_folder_reads_as_its_safetensors_twin(model, change, tmp_path, read_raw):
    folder = model("micro-moe", layout="paddle", dtype="float32")
    state = {name: paddle.to_tensor(array.copy()) for name, (_, array) in read_raw(folder).items()}
    halved = "ernie.layers.0.mlp.down_proj.weight"
    state[halved] = state[halved].astype("bfloat16")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    paddle.save(state, str(pickled / "model_state.pdparams"))
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    opened, twin = Folder.open(pickled), Folder.open(folder)
    opened.check()
    assert opened.tag(halved) == "U16"
    for atom in twin.table.atoms:
        expected = twin.read_atom(atom)
        if atom == "model.layers.0.mlp.down_proj.weight":
            expected = expected.astype(opened.read_atom(atom).dtype)
        np.testing.assert_array_equal(opened.read_atom(atom), expected)


# ---------------------------------------------------------------------- not a model folder
@pytest.mark.parametrize(
    ("path", "command"),
    [
        (
            "baidu/ERNIE-4.5-0.3B-Paddle",
            "hf download baidu/ERNIE-4.5-0.3B-Paddle --local-dir baidu/ERNIE-4.5-0.3B-Paddle",
        ),
        ("ERNIE-4.5-21B-A3B-PT", "hf download baidu/ERNIE-4.5-21B-A3B-PT --local-dir ERNIE-4.5-21B-A3B-PT"),
        (
            "/nowhere/models/ERNIE-4.5-0.3B-PT",
            "hf download baidu/ERNIE-4.5-0.3B-PT --local-dir /nowhere/models/ERNIE-4.5-0.3B-PT",
        ),
        ("someone/a-model", "If it is a Hugging Face id, download it with\n    hf download someone/a-model"),
    ],
)
def test_a_missing_folder_prints_the_download_command(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = judged(path)
    assert command in problem


def test_a_missing_folder_that_is_no_hub_id_and_a_file(tmp_path):
    assert judged(tmp_path / "my" / "model") == [f"{tmp_path}/my/model: no such model folder."]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in judged(tmp_path / "model.safetensors")[0]


def test_config_json_missing_or_of_another_model(model):
    folder = model()
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "not an ERNIE 4.5 model" in judged(folder)[0]
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in judged(folder)[0]
    (folder / "config.json").unlink()
    assert "config.json: missing" in judged(folder)[0]


def test_a_folder_without_weights(model):
    folder = model()
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in judged(folder)[0]
    (folder / "lora_model_state.pdparams").write_bytes(b"an adapter is no model")
    assert "holds no weights" in judged(folder)[0]
    for rank in range(2):
        (folder / f"model_state.tp0{rank}.pdparams").write_bytes(b"")
    assert "several .pdparams files" in judged(folder)[0]


def test_other_layouts_are_refused(model, change):
    folder = model(layout="paddle")

    def as_paddleformers(tensors):
        for name in list(tensors):
            tensors[name.replace("ernie.", "model.")] = tensors.pop(name)

    change(folder, as_paddleformers)
    assert "PaddleFormers" in judged(folder)[0]


# ---------------------------------------------------------------------- wrong tensors
def test_missing_extra_misshapen_and_unreadable_tensors_are_listed_together(model, change):
    folder = model()

    def damage(tensors):
        del tensors[NORM]
        tensors["model.layers.9.input_layernorm.weight"] = ("F32", np.zeros(64, np.float32))
        tensors[DOWN] = ("F32", np.zeros((64, 33), np.float32))
        tensors["model.norm.weight"] = ("F16", np.ones(64, np.float16))

    change(folder, damage)
    problems = judged(folder)
    assert len(problems) == 4
    assert f"{folder}: tensor '{NORM}' [64] is missing." in problems
    where = f"{folder / 'model.safetensors'}: tensor "
    assert f"{where}'{DOWN}' has shape [64, 33]; config.json asks for [64, 32]." in problems
    assert f"{where}'model.layers.9.input_layernorm.weight' [64] does not belong to this config.json." in problems
    assert f"{where}'model.norm.weight' has format F16; BF16, U16, F32 are read." in problems


@pytest.mark.parametrize("marked", [True, False])
def test_a_quantised_folder_is_refused_with_a_way_out(model, change, marked):
    folder = model()
    if marked:
        change(folder, quantization_config={"quant_method": "w4a8", "bits": 4})
    else:
        change(folder, lambda tensors: tensors.update({DOWN: ("I8", np.zeros([64, 32], np.int8))}))
    because = "quantization_config: {.*w4a8" if marked else f"'{DOWN}' has format I8"
    with pytest.raises(CheckpointError, match=rf"is a quantised model \(.*{because}.*compute_type: wint8, wint4/8"):
        Folder.open(folder)


def test_long_lists_are_cut_with_a_count(model, change):
    folder = model()
    change(folder, num_hidden_layers=2)
    problems = judged(folder)
    assert len(problems) == 21
    count = sum("layers.2." in name for name in Folder.open(folder).names)
    assert problems[-1] == f"... and {count - 20} more"


def test_a_config_that_wants_another_shape(model, change):
    folder = model("micro-dense", layout="paddle")
    change(folder, intermediate_size=96)
    assert any("[64, 256]; config.json asks for [64, 192]" in problem for problem in judged(folder))


def test_a_truncated_weight_file(model):
    folder = model()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    assert "is truncated" in judged(folder)[0]


def test_untied_without_a_head_names_the_setting(model, change):
    folder = model()
    change(folder, tie_word_embeddings=False)
    (problem,) = judged(folder)
    assert "'lm_head.weight' [512, 64] is missing" in problem
    assert "tie_word_embeddings" in problem


# ---------------------------------------------------------------------- the exceptions
@pytest.mark.parametrize(
    ("layout", "name"), [("pt", "model.embed_tokens.weight"), ("paddle", "ernie.embed_tokens.weight")]
)
def test_a_tied_head_must_equal_the_embedding(model, change, layout, name):
    folder = model(layout=layout)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[name]}))
    assert Folder.open(folder).form.head_copy
    Folder.open(folder).check()

    def one_number_differs(tensors):
        tag, array = tensors["lm_head.weight"]
        array = array.copy()
        array[300, 5] += 1
        tensors["lm_head.weight"] = (tag, array)

    change(folder, one_number_differs)
    (problem,) = judged(folder)
    assert "tie_word_embeddings" in problem
    assert "row 300" in problem


def test_an_absent_correction_bias_is_told_and_a_partly_absent_one_is_an_error(model, change):
    folder = model()

    def without(*layers):
        def drop(tensors):
            for layer in layers:
                del tensors[f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"]

        return drop

    change(folder, without(1))
    assert "model.layers.1.mlp.moe_statics.e_score_correction_bias' [1, 4] is missing" in judged(folder)[0]
    change(folder, without(2))
    opened = Folder.open(folder)
    opened.check()
    assert "zeros are used" in opened.notices[0]


def test_multi_token_prediction_in_the_config_only_is_off(model, change):
    folder = model()
    change(folder, num_nextn_predict_layers=1)
    opened = Folder.open(folder)
    opened.check()
    assert opened.config.num_nextn_predict_layers == 0
    assert "none will be used" in opened.notices[0]


def test_multi_token_prediction_stored_and_switched_off_is_told(golden, tmp_path, change):
    import shutil

    folder = tmp_path / "mtp"
    shutil.copytree(golden / "paddle_real" / "moe_mtp", folder)
    assert Folder.open(folder).notices == []
    assert Folder.open(folder).config.num_nextn_predict_layers == 1
    change(folder, num_nextn_predict_layers=0)
    opened = Folder.open(folder)
    opened.check()
    assert opened.has_mtp
    assert "carried through" in opened.notices[0]


def test_the_orientation_of_mtp_linear_proj_in_pt_does_not_matter(golden, tmp_path, change):
    from erniekit.checkpoint.convert import convert

    name = "model.mtp_linear_proj.0.weight"
    convert(golden / "paddle_real" / "moe_mtp", tmp_path / "pt", to="pt")
    before = Folder.open(tmp_path / "pt").read_atom(name).copy()
    assert Folder.open(tmp_path / "pt").shapes[name] == (48, 96)
    change(tmp_path / "pt", lambda tensors: tensors.update({name: ("F32", tensors[name][1].T)}))
    opened = Folder.open(tmp_path / "pt")
    opened.check()
    assert opened.shapes[name] == (96, 48)
    np.testing.assert_array_equal(opened.read_atom(name), before)
