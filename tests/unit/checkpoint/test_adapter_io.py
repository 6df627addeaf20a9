"""Adapters of models in memory: saved, loaded again, and what other implementations compute with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest

from erniekit.adapters.lora import adapter_parameters, add_adapters
from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_io import check_base, load_adapter, save_adapter
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import SafetensorsFile
from erniekit.checkpoint.model_io import build_model
from erniekit.config.adapter import AdapterConfig


def adapted(base: Folder, folder: AdapterFolder):
    """The base with the adapter of a folder beside it."""
    model = build_model(base, base.config)
    add_adapters(model, folder.config, seed=0, draw=False)
    load_adapter(model, folder)
    model.eval()
    return model


def read(path, name: str) -> np.ndarray:
    return np.array(SafetensorsFile(path).read(name))


def logits(model, ids: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        return model(paddle.to_tensor(ids)).numpy()


@pytest.mark.parametrize(
    ("adapter", "base", "expected", "names"),
    [
        ("peft/moe", "moe/shared_tied/pt", "peft/moe/expected", ("input_ids", "logits")),
        ("peft/dora", "dense/untied_bias/pt", "peft/dora/expected", ("input_ids", "logits")),
        ("paddle_real/lora_moe_shared", "paddle_real/moe_shared", "paddle_real/lora_moe_shared/io",
         ("in.input_ids", "logits")),
    ],
)  # fmt: skip
def test_logits_are_those_of_who_wrote_the_adapter(golden, adapter, base, expected, names):
    file = golden / f"{expected}.safetensors"
    ids, wanted = read(file, names[0]), read(file, names[1])
    found = logits(adapted(Folder.open(golden / base), AdapterFolder.open(golden / adapter)), ids)
    assert np.abs(found - wanted).max() <= 2e-5


TARGETS = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
           "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")  # fmt: skip


@pytest.mark.parametrize("form", ["peft", "erniekit"])
@pytest.mark.parametrize("start", ["default", "pissa"])
def test_an_adapter_comes_back_from_disk(golden, tmp_path, form, start):
    base = Folder.open(golden / "moe" / "shared_tied" / "pt")
    saved = ("model.norm",) if start == "default" else ()
    config = AdapterConfig(rank=3, alpha=6, init=start, targets=TARGETS, modules_to_save=saved)
    model = build_model(base, base.config)
    add_adapters(model, config, seed=1)
    for i, p in enumerate(adapter_parameters(model).values()):
        paddle.seed(i)
        if not p.stop_gradient:
            p.set_value(p + 0.1 * paddle.randn(p.shape))
    save_adapter(model, tmp_path / "adapter", config=config, form=form, base=base, dtype="float32")
    folder = AdapterFolder.open(tmp_path / "adapter")
    check_base(folder, base)
    ids = np.arange(3, 27).reshape(2, 12)
    assert np.abs(logits(adapted(base, folder), ids) - logits(model, ids)).max() <= 2e-5
    if form == "peft":  # exact: this is what a checkpoint holds
        again = build_model(base, base.config)
        add_adapters(again, config, seed=2)
        load_adapter(again, folder)
        for name, p in adapter_parameters(again).items():
            assert np.array_equal(p.numpy(), adapter_parameters(model)[name].numpy()), name


@pytest.mark.parametrize("form", ["peft", "erniekit"])
def test_experts_and_routers_trained_whole_come_back(golden, tmp_path, form):
    base = Folder.open(golden / "moe" / "shared_tied" / "pt")
    saved = ("model.layers.1.mlp.experts", "model.layers.2.mlp.gate")
    config = AdapterConfig(rank=2, alpha=4, targets=TARGETS[:3], modules_to_save=saved)
    model = build_model(base, base.config)
    add_adapters(model, config, seed=1)
    for p in adapter_parameters(model).values():
        p.set_value(p + 0.1 * paddle.randn(p.shape))
    save_adapter(model, tmp_path / "adapter", config=config, form=form, base=base, dtype="float32")
    folder, ids = AdapterFolder.open(tmp_path / "adapter"), np.arange(3, 27).reshape(2, 12)
    assert folder.config.modules_to_save == saved
    assert np.abs(logits(adapted(base, folder), ids) - logits(model, ids)).max() <= 2e-5


def test_another_adapter_than_the_models_is_refused(golden):
    base, folder = Folder.open(golden / "moe" / "shared_tied" / "pt"), AdapterFolder.open(golden / "peft" / "moe")
    model = build_model(base, base.config)
    add_adapters(model, AdapterConfig(rank=8, alpha=16, targets=folder.config.targets[1:]), seed=0)
    before = {name: p.numpy() for name, p in adapter_parameters(model).items()}
    with pytest.raises(CheckpointError) as error:
        load_adapter(model, folder)
    assert "has no place in the model" in str(error.value) and "the model's is [8, 48, 8]" in str(error.value)
    assert all(np.array_equal(p.numpy(), before[name]) for name, p in adapter_parameters(model).items())
    model = build_model(base, base.config)
    add_adapters(model, dataclasses.replace(folder.config, alpha=4), seed=0)
    with pytest.raises(CheckpointError, match="its scale is 2; the model's is 1"):
        load_adapter(model, folder)


def test_a_base_of_other_weights_is_told(golden, tmp_path, capsys, model):
    first, other = model("micro-dense", name="first"), model("micro-dense", name="other")
    raw = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(raw[:-4096] + bytes(4096))
    base = Folder.open(first)
    config = AdapterConfig(rank=2, alpha=4, targets=("model.layers.0.self_attn.q_proj",))
    run = build_model(base, base.config)
    add_adapters(run, config, seed=0)
    save_adapter(run, tmp_path / "adapter", config=config, form="peft", base=base, dtype="float32")
    folder = AdapterFolder.open(tmp_path / "adapter")
    check_base(folder, base)
    assert capsys.readouterr().err == ""
    check_base(folder, Folder.open(other))
    assert "was made for other weights" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="does not fit"):
        check_base(folder, Folder.open(golden / "moe" / "shared_tied" / "pt"))
