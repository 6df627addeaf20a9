"""Between folders and a model's own memory: what is loaded, refused, carried through and written."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.ernie45 import Form, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.save import save_folder
from erniekit.checkpoint.verify import verify
from tests.loading import load_into

BIAS = "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def memory_of(cfg, *, head_bias=False, fill=np.nan, dtype=np.float32):
    """Arrays shaped like the parameters of a model of `cfg`."""
    form = Form(
        head=not cfg.tie_word_embeddings, mtp_layers=cfg.num_nextn_predict_layers, head_bias=head_bias, head_rows=False
    )
    tensors = layout_table(cfg, "ram", form).tensors
    return {name: np.full(tensor.shape, fill, dtype) for name, tensor in tensors.items()}


def loaded(folder, **changes):
    opened = Folder.open(folder)
    cfg = opened.config.replace(**changes)
    arrays = memory_of(cfg, head_bias=opened.has_head_bias)
    load_into(opened, arrays, cfg=cfg)
    return cfg, arrays


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_memory_holds_what_the_files_say(model, read_raw, layout):
    folder = model("micro-moe", layout="pt", dtype="float32", name="pt")
    raw = {name: array for name, (_, array) in read_raw(folder).items()}
    _, arrays = loaded(model("micro-moe", layout=layout, dtype="float32", name=layout + "2"))
    assert not any(np.isnan(array).any() for array in arrays.values())
    layer = "model.layers.2."
    np.testing.assert_array_equal(arrays[layer + "self_attn.k_proj.weight"], raw[layer + "self_attn.k_proj.weight"].T)
    experts = arrays[layer + "mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(experts[3, :, :32], raw[layer + "mlp.experts.3.gate_proj.weight"].T)
    np.testing.assert_array_equal(experts[3, :, 32:], raw[layer + "mlp.experts.3.up_proj.weight"].T)
    down = arrays[layer + "mlp.experts.down_proj"]
    np.testing.assert_array_equal(down[0], raw[layer + "mlp.experts.0.down_proj.weight"].T)
    np.testing.assert_array_equal(arrays["model.embed_tokens.weight"], raw["model.embed_tokens.weight"])
    np.testing.assert_array_equal(arrays[layer + "mlp.gate.weight"], raw[layer + "mlp.gate.weight"].T)


def test_pages_of_the_files_are_released_while_loading(model, monkeypatch):
    released = set()
    monkeypatch.setattr(Folder, "release", lambda _, atom: released.add(atom))
    folder = model()
    loaded(folder)
    assert released == Folder.open(folder).table.atoms.keys()


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("family", ["micro-moe", "micro-dense"])
def test_what_is_saved_is_what_was_loaded(model, read_raw, tmp_path, family, layout):
    source = model(family, layout=layout)
    base = Folder.open(source)
    cfg, arrays = loaded(source)
    save_folder(tmp_path / "saved", arrays, cfg=cfg, layout=layout, dtype="bfloat16", base=base)
    assert verify(tmp_path / "saved") == []
    saved, original = read_raw(tmp_path / "saved"), read_raw(source)
    assert saved.keys() == original.keys()
    for name, (tag, array) in original.items():
        assert saved[name][0] == tag
        np.testing.assert_array_equal(saved[name][1], array)
    assert json.loads((tmp_path / "saved" / "config.json").read_bytes()) == json.loads(base.config_json)


def test_saving_rounds_to_bfloat16_and_keeps_routers_exact(model, read_raw, tmp_path):
    cfg, arrays = loaded(model())
    rng = np.random.default_rng(0)
    for array in arrays.values():
        array[...] = rng.standard_normal(array.shape)
    save_folder(tmp_path / "saved", arrays, cfg=cfg, layout="pt", dtype="bfloat16")
    raw = read_raw(tmp_path / "saved")
    name = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(raw[name][1], arrays[name].T.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert raw["model.layers.1.mlp.gate.weight"][0] == "F32"
    np.testing.assert_array_equal(raw["model.layers.1.mlp.gate.weight"][1], arrays["model.layers.1.mlp.gate.weight"].T)
    np.testing.assert_array_equal(raw[BIAS][1], arrays[BIAS])


def test_saving_in_shards_from_memory_in_bfloat16(model, tmp_path):
    cfg, arrays = loaded(model())
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    save_folder(tmp_path / "saved", halves, cfg=cfg, layout="paddle", dtype="float32", max_shard_bytes=100_000)
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 3
    _, again = loaded(tmp_path / "saved")
    for name, array in halves.items():
        np.testing.assert_array_equal(again[name], array.astype(np.float32))


def test_a_new_model_replaces_the_weight_files_of_an_earlier_one(model, tmp_path):
    cfg, arrays = loaded(model())
    out = tmp_path / "out"
    save_folder(out, arrays, cfg=cfg, layout="pt", dtype="float32", max_shard_bytes=100_000)
    (out / "train_log.jsonl").write_text("kept")
    save_folder(out, arrays, cfg=cfg, layout="pt", dtype="float32")
    assert verify(out) == []
    files = ["config.json", "manifest.json", "model.safetensors", "train_log.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == files


def test_the_tied_copy_and_the_tag_of_the_base_are_kept(golden, read_raw, tmp_path):
    source = golden / "paddle_real" / "moe_shared_bf16_sharded"
    cfg, arrays = loaded(source)
    save_folder(tmp_path / "saved", arrays, cfg=cfg, layout="paddle", dtype="bfloat16", base=Folder.open(source))
    saved, original = read_raw(tmp_path / "saved"), read_raw(source)
    assert {name: tag for name, (tag, _) in saved.items()} == {name: tag for name, (tag, _) in original.items()}
    np.testing.assert_array_equal(saved["lm_head.weight"][1], original["ernie.embed_tokens.weight"][1])
    assert (tmp_path / "saved" / "generation_config.json").is_file()


def test_multi_token_prediction_that_was_not_loaded_is_carried_through(golden, read_raw, tmp_path):
    source = golden / "paddle_real" / "moe_mtp"
    cfg, arrays = loaded(source, num_nextn_predict_layers=0)
    assert not any("mtp" in name for name in arrays)
    arrays["model.norm.weight"] += 1  # trained
    for layout in ("paddle", "pt"):
        out = tmp_path / layout
        save_folder(out, arrays, cfg=cfg, layout=layout, dtype="float32", base=Folder.open(source))
        again = Folder.open(out)
        again.check()
        assert again.has_mtp
        assert again.config.num_nextn_predict_layers == 1
        original = Folder.open(source)
        for atom in original.table.atoms:
            expected = original.read_atom(atom) + (atom == "model.norm.weight")
            np.testing.assert_array_equal(again.read_atom(atom), expected)


# ---------------------------------------------------------------------- exceptions and refusals
def test_wanted_multi_token_prediction_must_be_stored_or_drawn(model):
    opened = Folder.open(model())
    cfg = opened.config.replace(num_nextn_predict_layers=1)
    arrays = memory_of(cfg, fill=5)
    with pytest.raises(CheckpointError, match="mtp_init: random"):
        load_into(opened, arrays, cfg=cfg)
    assert all((array == 5).all() for array in arrays.values())  # nothing was written before the error
    load_into(opened, arrays, cfg=cfg, mtp_init="random")
    untouched = {name for name, array in arrays.items() if (array == 5).all()}
    assert untouched == {name for name in arrays if "mtp" in name}


def test_an_absent_correction_bias_is_zeros(model, change):
    folder = model()
    change(folder, lambda t: [t.pop(name) for name in list(t) if "e_score_correction_bias" in name])
    _, arrays = loaded(folder)
    assert (arrays[BIAS] == 0).all()


def test_a_stored_head_bias_needs_a_place(model, change):
    folder = model(dtype="float32")
    bias = np.arange(512, dtype=np.float32)
    change(folder, lambda tensors: tensors.update({"lm_head.bias": ("F32", bias)}))
    opened = Folder.open(folder)
    assert opened.has_head_bias
    arrays = memory_of(opened.config, head_bias=True)
    load_into(opened, arrays, cfg=opened.config)
    np.testing.assert_array_equal(arrays["lm_head.bias"], bias)
    with pytest.raises(CheckpointError, match=r"'lm_head\.bias' is stored and the model has no place"):
        load_into(opened, memory_of(opened.config), cfg=opened.config)
    opened = Folder.open(model(dtype="float32", name="without"))
    with pytest.raises(CheckpointError, match=r"'lm_head\.bias' is wanted and not stored"):
        load_into(opened, memory_of(opened.config, head_bias=True), cfg=opened.config)


def test_loading_another_architecture_is_refused(model):
    opened = Folder.open(model("micro-dense"))
    other = opened.config.replace(num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* is wanted and not stored"):
        load_into(opened, memory_of(other), cfg=other)
    fewer = opened.config.replace(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..* the model has no place"):
        load_into(opened, memory_of(fewer), cfg=fewer)


def test_a_damaged_folder_is_never_loaded(model, change):
    folder = model()
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    opened = Folder.open(folder)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' \[64\] is missing"):
        load_into(opened, memory_of(opened.config), cfg=opened.config)


def test_saving_where_a_file_is_and_where_nothing_may_be_written(model, tmp_path):
    cfg, arrays = loaded(model())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        save_folder(tmp_path / "file", arrays, cfg=cfg, layout="pt", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_folder(tmp_path / "file" / "below", arrays, cfg=cfg, layout="pt", dtype="bfloat16")
    assert (tmp_path / "file").read_text() == "mine"


def test_companions_are_copied_and_run_files_are_not(model, tmp_path):
    source = model()
    kept = ("tokenizer.model", "tokenizer_config.json", "LICENSE", "chat_template.jinja", "generation_config.json")
    for name in (*kept, "run.json", "train_log.jsonl", "optimizer.pdopt", "erniekit_origin.json"):
        (source / name).write_text(name)
    cfg, arrays = loaded(source)
    save_folder(tmp_path / "saved", arrays, cfg=cfg, layout="pt", dtype="bfloat16", base=Folder.open(source))
    written = {path.name for path in (tmp_path / "saved").iterdir()}
    assert written == {*kept, "config.json", "model.safetensors", "manifest.json"}
