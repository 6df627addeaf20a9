"""Random models: any family or preset, the same numbers in every layout, with a tokenizer that fits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError, ConfigError, DataError
from erniekit.checkpoint.create import create
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.verify import verify
from erniekit.config import families
from erniekit.config.families import FAMILIES, SMALL_PRESETS, count_parameters, family
from erniekit.data.tokenizer import Tokenizer

TEXT = "One line of text about nothing.\nAnother line, 2 words longer than that.\n" * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_every_small_preset_is_sound_in_both_layouts(tmp_path, name):
    create(name, tmp_path / "pt", layout="pt", seed=3)
    create(name, tmp_path / "paddle", layout="paddle", seed=3, max_shard_bytes=2_000_000)
    assert verify(tmp_path / "pt") == verify(tmp_path / "paddle") == []
    pt, paddle = Folder.open(tmp_path / "pt"), Folder.open(tmp_path / "paddle")
    assert pt.config.replace(extras={}) == family(name).replace(extras={})
    for atom in pt.table.atoms:
        np.testing.assert_array_equal(pt.read_atom(atom), paddle.read_atom(atom))
    assert sum(np.prod(atom.shape) for atom in pt.table.atoms.values()) == count_parameters(family(name))


def test_the_numbers_are_what_they_are_said_to_be(tmp_path):
    create("tiny-moe", tmp_path / "a", seed=1, dtype="float32")
    folder = Folder.open(tmp_path / "a")
    matrix = folder.read_atom("model.layers.1.mlp.experts.3.down_proj.weight")
    assert abs(matrix.std() - 0.02) < 2e-4
    assert abs(matrix.mean()) < 2e-4
    assert (folder.read_atom("model.layers.2.input_layernorm.weight") == 1).all()
    assert (folder.read_atom("model.layers.1.mlp.moe_statics.e_score_correction_bias") == 0).all()
    other = folder.read_atom("model.layers.1.mlp.experts.4.down_proj.weight")
    assert not (matrix == other).any()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, read_raw):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        create("micro-moe", tmp_path / out, seed=seed)
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c


def test_chunks_do_not_change_the_numbers(tmp_path, monkeypatch):
    from erniekit.checkpoint import create as module

    create("micro-dense", tmp_path / "whole")
    monkeypatch.setattr(module, "_CHUNK", 1001)
    create("micro-dense", tmp_path / "chunks")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "chunks" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_a_vision_language_model(tmp_path, monkeypatch, layout):
    small = FAMILIES["ERNIE-4.5-VL-28B-A3B"] | dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_num_experts=[4, 4], moe_k=2, moe_intermediate_size=[16, 8],
        pixel_hidden_size=8,
    )  # fmt: skip
    small["vision_config"] = small["vision_config"] | dict(depth=2, embed_dim=8, num_heads=2, patch_size=4)
    monkeypatch.setitem(families.FAMILIES, "small-vl", small)
    create("small-vl", tmp_path / "out", layout=layout)
    assert verify(tmp_path / "out") == []
    folder = Folder.open(tmp_path / "out")
    assert (folder.read_atom("vision_model.ln.weight") == 1).all()
    assert (folder.read_atom("vision_model.blocks.1.attn.qkv.bias") == 0).all()
    assert folder.read_atom("vision_model.blocks.1.attn.qkv.weight").astype(np.float32).std() > 0.01
    assert folder.form.head
    assert sum(np.prod(atom.shape) for atom in folder.table.atoms.values()) == count_parameters(family("small-vl"))


# ---------------------------------------------------------------------- vocabulary and tokenizer
def test_a_trained_tokenizer_comes_with_the_model(tmp_path, text_file):
    create("micro-moe", tmp_path / "out", tokenizer_texts=[text_file], vocab_size=400)
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["vocab_size"] == 400
    assert tokenizer.max_id < 400
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_bytes())
    assert generation["eos_token_id"] == tokenizer.eos_id
    assert verify(tmp_path / "out") == []


def test_a_small_preset_takes_its_vocabulary_from_a_copied_tokenizer(tmp_path, text_file):
    create("micro-moe", tmp_path / "first", tokenizer_texts=[text_file], vocab_size=400)
    tokenizer = Tokenizer.from_folder(tmp_path / "first")
    create("micro-dense", tmp_path / "second", tokenizer=tmp_path / "first")
    assert Folder.open(tmp_path / "second").config.vocab_size == tokenizer.vocab_size
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == (
        tmp_path / "first" / "tokenizer.model"
    ).read_bytes()
    create("micro-dense", tmp_path / "third", tokenizer=tmp_path / "first", vocab_size=1000)
    assert Folder.open(tmp_path / "third").config.vocab_size == 1000


def test_a_vocabulary_that_does_not_cover_the_tokenizer_is_refused(tmp_path, text_file):
    create("micro-moe", tmp_path / "first", tokenizer_texts=[text_file], vocab_size=400)
    with pytest.raises(DataError, match="vocab_size 300"):
        create("micro-dense", tmp_path / "second", tokenizer=tmp_path / "first", vocab_size=300)
    assert not (tmp_path / "second").exists()


# ---------------------------------------------------------------------- refusals
def test_wrong_wishes_are_all_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        create("micro-moe", tmp_path / "out", layout="onnx", dtype="int4", vocab_size=0, seed=-1)
    assert len(error.value.problems) == 4
    with pytest.raises(ConfigError, match="either copied"):
        create("micro-moe", tmp_path / "out", tokenizer="a", tokenizer_texts=["b"])
    with pytest.raises(ConfigError, match="Did you mean 'tiny-moe'"):
        create("tinymoe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        create("micro-moe", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
