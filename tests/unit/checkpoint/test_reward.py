"""Reward models on disk: made from a language model, written in both layouts, told apart when they come back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.convert import convert
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_model
from erniekit.checkpoint.model_io import build_model, save_model
from erniekit.checkpoint.verify import verify
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.reward import ErnieForReward


def parameters(model):
    return {name: p.numpy() for name, p in model.named_parameters()}


@pytest.fixture(params=["micro-dense", "micro-moe", "dense/untied_bias/pt", "paddle_real/moe_mtp"])
def language_model(request, model, golden):
    """Tied and untied ones, with a bias on the head, with multi-token prediction."""
    return model(request.param) if request.param.startswith("micro") else golden / request.param


def fresh(folder, seed=0):
    base = Folder.open(folder)
    arch = base.config.replace(is_reward=True, num_nextn_predict_layers=0)
    return base, build_model(base, arch, seed=seed)


def test_a_reward_model_is_a_language_model_with_a_drawn_score_for_a_head(language_model):
    base, made = fresh(language_model)
    assert isinstance(made, ErnieForReward)
    found, origin = parameters(made), parameters(build_model(base, made.config.replace(is_reward=False)))
    score = found.pop("score.weight")
    assert score.shape == (base.config.hidden_size, 1)
    assert 0.5 < score.std() / base.config.initializer_range < 2.0
    for name, array in found.items():
        np.testing.assert_array_equal(array, origin[name])
    again, other = (parameters(fresh(language_model, seed)[1])["score.weight"] for seed in (0, 1))
    np.testing.assert_array_equal(again, score)
    assert (other != score).any()


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_it_comes_back_from_either_layout(language_model, read_raw, tmp_path, layout):
    base, made = fresh(language_model)
    saved, other = tmp_path / "saved", tmp_path / "other"
    save_model(made, saved, layout, dtype="float32", base=base)
    assert verify(saved) == []
    raw, config = read_raw(saved), json.loads((saved / "config.json").read_bytes())
    size = base.config.hidden_size
    assert raw["score.weight"][1].shape == ((1, size) if layout == "pt" else (size, 1))
    assert not [name for name in raw if "lm_head" in name or "mtp" in name]
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["num_labels"] == 1
    back = load_model(saved)
    assert isinstance(back, ErnieForReward)
    expected = parameters(made)
    assert parameters(back).keys() == expected.keys()
    for name, array in parameters(back).items():
        np.testing.assert_array_equal(array, expected[name])
    convert(saved, other, to="paddle" if layout == "pt" else "pt")
    for name, array in parameters(load_model(other)).items():
        np.testing.assert_array_equal(array, expected[name])


def test_it_is_no_language_model(model, tmp_path):
    base, made = fresh(model("micro-dense"))
    save_model(made, tmp_path / "reward", dtype="float32", base=base)
    folder = Folder.open(tmp_path / "reward")
    with pytest.raises(CheckpointError, match=r"'score\.weight' is stored and the model has no place"):
        build_model(folder, folder.config.replace(is_reward=False))


def test_strangers_among_its_tensors_are_refused(model, read_raw, write_raw, tmp_path):
    base, made = fresh(model("micro-dense"))
    save_model(made, tmp_path, dtype="float32", base=base)
    (path,) = tmp_path.glob("model*.safetensors")
    raw = read_raw(path)
    write_raw(path, raw | {"lm_head.weight": raw["model.embed_tokens.weight"]})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' .* does not belong"):
        load_model(tmp_path)
    write_raw(path, {name: value for name, value in raw.items() if name != "score.weight"})
    with pytest.raises(CheckpointError, match=r"'score\.weight' \[1, \d+\] is missing"):
        load_model(tmp_path)


def test_more_than_one_number_for_a_text_is_refused(model, tmp_path):
    base, made = fresh(model("micro-dense"))
    save_model(made, tmp_path, dtype="float32", base=base)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    with pytest.raises(CheckpointError, match="num_labels is 3"):
        Folder.open(tmp_path)


def test_a_language_model_stays_one(model):
    assert isinstance(load_model(model("micro-dense")), ErnieForCausalLM)
