"""Models from quantised folders: the logits of their decoded weights, inputs and caches rounded as a plain reference
rounds them, and memory that never holds a dense copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError, ConfigError, MeshError
from erniekit.checkpoint.create import create
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_for_answers, load_model
from erniekit.checkpoint.model_io import build_model, save_model
from erniekit.checkpoint.quantised_folder import QuantisedFolder
from erniekit.checkpoint.quantised_io import build_quantised
from erniekit.config import families
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.config.packing import Packing
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.precision.packed import packed_weights
from tests.quantised import quantise_folder

WIDE = families.FAMILIES["micro-moe"] | dict(
    hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, num_nextn_predict_layers=1, use_bias=True,
)  # fmt: skip
FORMATS = [
    ("wint8", None), ("wint8", 32), ("wint4", None), ("wint4", 64), ("w4a8", None), ("w4a8c8", None), ("fp8", None),
    ("fp8", 128), ("wint2", None), ("wint2.5", None),
]  # fmt: skip
IDS = np.random.default_rng(2).integers(3, 500, [2, 40])


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A function from a format to a folder that has it."""
    root, made = tmp_path_factory.mktemp("quantised"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "wide", WIDE)
        create("wide", root / "base", layout="paddle", dtype="float32", seed=3)

    def make(name: str, group_size: int | None = None) -> Path:
        key = name, group_size
        if key not in made:
            target = root / f"{name}-{group_size}"
            early = 2 if name.startswith("wint2") else None
            made[key] = quantise_folder(root / "base", target, name, group_size=group_size, int4_layers=early)
        return made[key]

    return make


def dense_of(path: Path) -> ErnieForCausalLM:
    """The same model with decoded weights in ordinary parameters."""
    folder = QuantisedFolder.open(path)
    model = build_model(folder, folder.config)
    model.eval()
    return model


def unrounded(model: ErnieForCausalLM) -> ErnieForCausalLM:
    """Without what becomes of its activations."""
    for layer in packed_weights(model).values():
        layer.rounding = None
    for layer in model.model.layers:
        layer.self_attn.kept = None
    return model


@pytest.mark.parametrize(("name", "group_size"), FORMATS)
def test_logits_are_those_of_the_decoded_weights(quantised, name, group_size):
    path = quantised(name, group_size)
    model, dense = unrounded(load_model(path)), dense_of(path)
    found, want = model(paddle.to_tensor(IDS)).numpy(), dense(paddle.to_tensor(IDS)).numpy()
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
    layers, parameters = packed_weights(model), dict(dense.named_parameters())
    # attention, a dense MLP, stacked and shared experts; of the prediction ahead its projection and a dense layer
    assert len(layers) == 3 * 4 + 3 + 2 * 5 + 1 + 4 + 3
    assert not layers.keys() & dict(model.named_parameters()).keys()
    for weight, layer in layers.items():
        count = layer.store.shape[0]
        decoded = np.stack([layer.store.dense(i).numpy() for i in range(count)]).reshape(layer.shape)
        np.testing.assert_array_equal(decoded, parameters[weight].numpy(), err_msg=weight)


def test_a_reward_model_scores_as_its_decoded_weights(quantised, tmp_path):
    base = Folder.open(quantised("wint4").parent / "base")
    reward = build_model(base, base.config.replace(is_reward=True, num_nextn_predict_layers=0), seed=5)
    save_model(reward, tmp_path / "reward", "paddle", dtype="float32", base=base)
    path = quantise_folder(tmp_path / "reward", tmp_path / "small", "w4a8c8")
    model, dense = unrounded(load_for_answers(path)), dense_of(path)
    positions, ends = np.tile(np.arange(40), [2, 1]), np.full(IDS.shape, 40, np.int32)
    given = [paddle.to_tensor(array) for array in (IDS, positions, ends)]
    found, want = (m.rewards(m.trunk(*given).hidden_BSD.flatten(0, 1)).numpy() for m in (model, dense))
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max() and want.std() > 0
    assert len(packed_weights(model)) == 25


def e4m3(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def reference_inputs(name: str, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What a product sees of its inputs, a number at a time."""
    if name == "w4a8":
        step = scale / np.float32(127)
        return np.clip(np.rint(x / step), -127, 127) * step
    if name == "fp8":
        return e4m3(x / scale) * scale
    blocks = x.reshape(len(x), -1, 128)
    largest = np.abs(blocks).max(-1, keepdims=True)
    powers = np.exp2(np.ceil(np.log2(largest / 448))).astype(np.float32)
    return (e4m3(blocks / powers) * powers).reshape(x.shape)


@pytest.mark.parametrize(
    ("name", "group_size", "module"),
    [("w4a8", None, "experts.2.down"), ("fp8", None, "experts.2.down"), ("fp8", 128, "experts.2.down"),
     ("fp8", None, "shared_experts.down")],
)  # fmt: skip
def test_rounded_inputs_are_those_of_a_plain_reference(quantised, name, group_size, module):
    folder = QuantisedFolder.open(quantised(name, group_size))
    tensor = f"ernie.layers.1.mlp.{module}_proj.weight"
    weight = folder.read_tensor(tensor)
    x = np.random.default_rng(0).normal(size=[9, len(weight)]).astype(np.float32)
    x[3] *= 40  # far beyond what was seen: cut
    scale = folder.arrays(tensor).get("activation_scale", np.ones(1, np.float32))
    want = reference_inputs("blocks" if group_size else name, x, scale) @ weight
    mlp = load_model(folder.path).model.layers[1].mlp
    if module.startswith("experts"):
        counts = [2, 0, 9, 1]
        rows = np.concatenate([np.ones([2, x.shape[1]], np.float32), x, np.ones([1, x.shape[1]], np.float32)])
        found = mlp.experts.down_packed(paddle.to_tensor(rows), counts).numpy()[2:11]
    else:
        found = mlp.shared_experts.down_proj(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_cache_of_int8_holds_codes_and_answers_as_the_whole_row(quantised):
    path = quantised("w4a8c8")
    model = load_model(path)
    exact = model(paddle.to_tensor(IDS[:1])).numpy()[0]
    cache, seen = model.new_cache(), []
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        seen.append(model.step(paddle.to_tensor(IDS[:1, start:stop]), cache).numpy()[0])
    assert cache.layers[0].held[0].dtype == paddle.int8
    np.testing.assert_allclose(seen, exact[[6, 7, 39]], rtol=0, atol=1e-5 * np.abs(exact).max())
    steps = QuantisedFolder.open(path).cache_scales(0)[1].reshape(2, 32) / np.float32(127)
    values = cache.layers[0].held[1].numpy()[0, :, :40]
    plain = unrounded(load_model(path))
    layer = plain.model.layers[0]
    normed = layer.input_layernorm(plain.model.embed_tokens(paddle.to_tensor(IDS[:1])))
    v = layer.self_attn.v_proj(normed).numpy()[0].reshape(40, 2, 32).transpose(1, 0, 2)
    np.testing.assert_array_equal(values, np.clip(np.rint(v / steps[:, None]), -127, 127))
    assert np.abs(plain(paddle.to_tensor(IDS[:1])).numpy()[0] - exact).max() > 1e-4 * np.abs(exact).max()


def test_rows_of_an_int8_cache_join_and_leave(quantised):
    model = load_model(quantised("w4a8c8"))
    alone = []
    for row in IDS:
        cache = model.new_cache()
        model.step(paddle.to_tensor(row[None, :9]), cache)
        alone.append(model.step(paddle.to_tensor(row[None, 9:10]), cache).numpy()[0])
    first, second = model.new_cache(), model.new_cache()
    model.step(paddle.to_tensor(IDS[:1, :9]), first)
    model.step(paddle.to_tensor(IDS[1:, :9]), second)
    first.join(second)
    found = model.step(paddle.to_tensor(IDS[:, 9:10]), first).numpy()
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5 * np.abs(found).max())
    first.keep([1])
    assert first.layers[0].held[0].shape[0] == 1 and first.layers[0].held[0].dtype == paddle.int8


def test_experts_may_be_shared_and_matrices_not(quantised):
    folder = QuantisedFolder.open(quantised("wint4"))
    whole = packed_weights(build_quantised(folder, folder.config, dtype="float32"))
    part = build_quantised(folder, folder.config, dtype="float32", cut=Cut.of(Layout(world=2, expert=2), 1))
    for name, layer in packed_weights(part).items():
        first = 2 if ".experts." in name and "shared" not in name else 0
        for index in range(layer.store.shape[0]):
            np.testing.assert_array_equal(layer.store.dense(index), whole[name].store.dense(first + index), name)
    with pytest.raises(MeshError, match=r"wint4-None: is quantised.*tensor_parallel_degree is 2.*expert_parallel_deg"):
        build_quantised(folder, folder.config, dtype="float32", cut=Cut.of(Layout(world=2, tensor=2), 0))


def test_what_does_not_go_with_a_quantised_folder_is_refused(quantised, tmp_path):
    path = quantised("wint8")
    with pytest.raises(ConfigError, match=r"is quantised \(wint8\) for inference already; leave compute_type: nf4 out"):
        load_for_answers(path, pack=Packing("nf4"))
    with pytest.raises(ConfigError, match=r"adapter belongs to the high-precision folder.*quantise the result"):
        load_for_answers(path, adapter=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"is a quantised model .* made for inference"):
        Folder.open(path)
    with pytest.raises(CheckpointError, match=r"holds 33 weights in few bits .*models in high precision are saved"):
        save_model(load_model(path), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


HEAVY = families.FAMILIES["micro-moe"] | dict(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, num_hidden_layers=4, moe_num_experts=12, moe_intermediate_size=512, moe_layer_start_index=1,
    moe_layer_end_index=3,
)  # fmt: skip

LOAD = """
import sys
from erniekit.base import runtime
runtime.prepare()
from pathlib import Path
from erniekit.checkpoint.load import load_model

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

load_model(sys.argv[2])  # libraries and threads come to life
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
model = load_model(sys.argv[1])
print((status("VmHWM:") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
def test_peak_memory_is_the_packed_size_and_the_largest_tensor_at_most(quantised, tmp_path, monkeypatch):
    """Of 144 MB in fp32 the weights take 18 in int4; one layer's experts alone are 38 when they are dense."""
    monkeypatch.setitem(families.FAMILIES, "heavy", HEAVY)
    create("heavy", tmp_path / "base", layout="paddle", dtype="bfloat16")
    path = quantise_folder(tmp_path / "base", tmp_path / "heavy", "wint4")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, path, quantised("wint4")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    model = load_model(path)
    packed = sum(layer.store.num_bytes() for layer in packed_weights(model).values())
    others = sum(4 * int(p.size) for p in model.parameters())
    largest = max(4 * int(p.size) for p in model.parameters())
    assert packed < int(done.stdout) <= packed + others + largest  # some of it lies in what the small model gave back
    assert packed < sum(layer.store.shape[0] * layer.store.shape[1] * layer.store.shape[2] for layer in
                        packed_weights(model).values()) * 0.51  # fmt: skip
