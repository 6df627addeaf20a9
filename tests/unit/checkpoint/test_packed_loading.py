"""Quantising while loading: the same codes from every layout, and never a dense copy of the model."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.create import create
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import build_model
from erniekit.config import families
from erniekit.config.packing import Packing
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.precision.packed import packed_weights
from erniekit.precision.quantize import dense, pack

MIXED = Packing("wint4/8")


def weights_of(model: ErnieForCausalLM) -> dict[str, np.ndarray]:
    """Every weight of a model as it counts, packed ones dense."""
    found = {name: p.numpy() for name, p in model.named_parameters()}
    for name, layer in packed_weights(model).items():
        count, *shape = layer.store.shape
        found[name] = np.stack([layer.store.dense(i).numpy() for i in range(count)]).reshape(layer.shape)
        assert list(found[name].shape[-2:]) == shape
    return found


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize(
    "packing", [Packing("wint8"), MIXED, Packing("wint4", 16), Packing("nf4", 32)], ids=lambda p: p.compute_type
)
def test_packed_weights_are_those_of_the_whole_model(model, layout, packing):
    folder = Folder.open(model(layout=layout))
    whole = weights_of(build_model(folder, folder.config))
    found = weights_of(build_model(folder, folder.config, pack=packing))
    assert found.keys() == whole.keys()
    for name, weight in whole.items():
        kind = packing.kind_of(name.removesuffix(".weight"))
        if kind is not None:
            stack = weight.reshape(-1, *weight.shape[-2:])
            made = [dense(*pack(w, kind, packing.group_size, name=name), kind, w.shape[0]) for w in stack]
            weight = np.stack(made).reshape(weight.shape)
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_a_packed_weight_is_no_parameter_and_in_no_state(model):
    folder = Folder.open(model())
    whole, packed = build_model(folder, folder.config), build_model(folder, folder.config, pack=MIXED)
    layers = packed_weights(packed)
    expected = {name for name, _ in whole.named_parameters()} - layers.keys()
    assert {name for name, _ in packed.named_parameters()} == expected == set(packed.state_dict())
    assert {n for n, p in packed.named_parameters() if p.stop_gradient} == {
        n for n, p in whole.named_parameters() if p.stop_gradient
    }
    experts = packed.model.layers[1].mlp.experts
    assert experts.gate_up_proj is None and experts.down_proj is None
    codes = experts.gate_up_packed.store.codes
    assert codes.dtype == paddle.uint8 and codes.shape == [4, 32, 64]  # two codes of 64 inputs in a byte
    assert packed.model.layers[0].self_attn.q_proj.packed.store.codes.dtype == paddle.int8


@pytest.mark.parametrize(
    "case", ["paddle_real/moe_shared_bf16_sharded", "moe/shared_tied/pt", "dense/untied_bias/paddle"]
)
def test_folders_of_others(golden, case):
    folder = Folder.open(golden / case)
    whole, packed = build_model(folder, folder.config), build_model(folder, folder.config, pack=Packing("wint8"))
    ids = paddle.to_tensor([[5, 9, 2, 7, 1]])
    want, found = whole(ids).numpy(), packed(ids).numpy()
    assert found.tobytes() != want.tobytes()
    assert np.abs(found - want).max() < 0.03 * np.abs(want).max()


def test_multi_token_prediction_that_is_drawn_is_packed_too(model):
    folder = Folder.open(model())
    cfg = folder.config.replace(num_nextn_predict_layers=1)
    whole = weights_of(build_model(folder, cfg, mtp_init="random", seed=3))
    found = weights_of(build_model(folder, cfg, mtp_init="random", seed=3, pack=MIXED))
    name = "model.mtp_linear_proj.0.weight"
    np.testing.assert_array_equal(found[name], dense(*pack(whole[name], "int8", None, name=name), "int8", 128))
    np.testing.assert_array_equal(found["model.mtp_emb_norm.0.weight"], np.ones(64, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(model, change, value):
    folder = model(dtype="float32")

    def spoil(tensors):
        tag, array = tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
        array = array.copy()
        array[5, 6] = value
        tensors["model.layers.1.mlp.experts.3.down_proj.weight"] = tag, array

    change(folder, spoil)
    opened = Folder.open(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight holds NaN or inf"):
        build_model(opened, opened.config, pack=MIXED)


def test_a_group_size_that_does_not_fit_is_refused_before_anything_is_read(model):
    folder = model()
    opened = Folder.open(folder)
    with pytest.raises(ConfigError, match=r"every 48 inputs .*model\.layers\.0\.self_attn\.q_proj has 64"):
        build_model(opened, opened.config, pack=Packing("wint8", 48))


HEAVY = families.FAMILIES["micro-moe"] | dict(
    vocab_size=4096, hidden_size=768, intermediate_size=2304, num_attention_heads=12, num_key_value_heads=4,
    head_dim=64, num_hidden_layers=4, moe_num_experts=24, moe_intermediate_size=704, moe_layer_start_index=1,
    moe_layer_end_index=3,
)  # fmt: skip

LOAD = """
import sys
from erniekit.base import runtime
runtime.prepare()
from pathlib import Path
import paddle
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import build_model
from erniekit.config.packing import Packing

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

folder = Folder.open(sys.argv[1])
small = Folder.open(sys.argv[2])
build_model(small, small.config, pack=Packing("wint4/8"))  # libraries and threads come to life
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
model = build_model(folder, folder.config, pack=Packing("wint4/8"))
print((status("VmHWM:") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
def test_peak_memory_is_the_quantised_size_and_a_shard_at_most(model, tmp_path, monkeypatch):
    """A model of 270 MB in bf16: 540 MB in fp32, 93 MB packed, in shards of 64 MB."""
    monkeypatch.setitem(families.FAMILIES, "heavy", HEAVY)
    path = tmp_path / "heavy"
    create("heavy", path, dtype="bfloat16", max_shard_bytes=64_000_000)
    folder = Folder.open(path)
    tensors = memory_table(folder.config, head_bias=False).tensors
    names = {name: name.removesuffix(".weight") for name in tensors}
    packed = sum(
        MIXED.num_bytes(names[name], t.shape) if MIXED.kind_of(names[name]) else 4 * math.prod(t.shape)
        for name, t in tensors.items()
    )
    whole = sum(4 * math.prod(t.shape) for t in tensors.values())
    shard = max(file.stat().st_size for file in path.glob("*.safetensors"))
    assert whole > 500_000_000 > 5 * packed

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, path, model()],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert packed <= int(done.stdout) <= packed + shard
