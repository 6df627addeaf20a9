"""Converting: there and back byte for byte, nothing lost or half-written, memory bounded by the largest tensor."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.convert import convert
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.verify import verify

ROOT = Path(__file__).parents[3]
ORIGIN = "erniekit_origin.json"
PADDLE = [
    "dense/tied/paddle", "dense/untied_bias/paddle", "moe/shared_tied/paddle", "moe/noshared_untied/paddle",
    "paddle_real/dense_mha", "paddle_real/dense_tied", "paddle_real/dense_tied_bf16_u16", "paddle_real/moe_shared",
    "paddle_real/moe_mtp", "paddle_real/moe_shared_bf16_sharded", "vl/vl_moe/paddle",
]  # fmt: skip
PT = ["dense/tied/pt", "dense/untied_bias/pt", "moe/shared_tied/pt", "moe/noshared_untied/pt"]


def assert_same_files(folder: Path, other: Path) -> None:
    """Weight files and config.json byte for byte; the index by its content."""
    files = {path.name for path in folder.glob("model*")}
    assert files == {path.name for path in other.glob("model*")}
    for name in files | {"config.json"}:
        ours, theirs = (folder / name).read_bytes(), (other / name).read_bytes()
        if name.endswith("index.json"):
            ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours == theirs, name


@pytest.mark.parametrize("case", PADDLE + PT)
def test_there_and_back_is_byte_equal(golden, tmp_path, case):
    here, there = ("pt", "paddle") if case in PT else ("paddle", "pt")
    convert(golden / case, tmp_path / "other", to=there)
    assert Folder.open(tmp_path / "other").layout == there
    convert(tmp_path / "other", tmp_path / "back", to=here)
    assert_same_files(golden / case, tmp_path / "back")
    assert verify(tmp_path / "other") == verify(tmp_path / "back") == []


def test_there_and_back_for_the_tensors_that_erniekit_writes_for_vision(golden, tmp_path, write_raw):
    """Names, shapes and formats as the real ERNIEKit wrote them, random numbers."""
    source = tmp_path / "source"
    source.mkdir()
    case = golden / "paddle_real" / "vl_moe"
    shutil.copy(case / "config.json", source)
    rng, table = np.random.default_rng(0), json.loads((case / "tensors.json").read_bytes())
    tensors = {name: (tag, rng.standard_normal(shape).astype(np.float32)) for name, (tag, shape) in table.items()}
    write_raw(source / "model.safetensors", tensors)
    convert(source, tmp_path / "pt", to="pt")
    convert(tmp_path / "pt", tmp_path / "back", to="paddle")
    for name, (_, array) in tensors.items():
        np.testing.assert_array_equal(Folder.open(tmp_path / "back").read_tensor(name), array)
    assert (source / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()


@pytest.mark.parametrize("case", ["paddle_real/moe_shared_bf16_sharded", "moe/shared_tied/pt"])
def test_the_same_layout_is_rewritten_as_it_was(golden, tmp_path, case):
    folder = Folder.open(golden / case)
    convert(golden / case, tmp_path / "again", to=folder.layout)
    assert_same_files(golden / case, tmp_path / "again")
    assert not (tmp_path / "again" / ORIGIN).exists()


# ---------------------------------------------------------------------- what a -PT export is
@pytest.mark.parametrize("case", ["dense_tied_bf16_u16", "moe_shared_bf16_sharded"])
def test_a_pt_export_is_what_transformers_expects(golden, tmp_path, read_raw, case):
    source = golden / "paddle_real" / case
    convert(source, tmp_path / "pt", to="pt")
    raw = read_raw(tmp_path / "pt")
    assert "lm_head.weight" not in raw  # tied
    for name, (tag, _) in raw.items():
        assert tag == ("F32" if "mlp.gate.weight" in name or "correction_bias" in name else "BF16"), name
    q = raw["model.layers.0.self_attn.q_proj.weight"][1]
    fused = read_raw(source)["ernie.layers.0.self_attn.qkv_proj.weight"][1]
    np.testing.assert_array_equal(q, fused[:, :64].T)
    gate = raw["model.layers.0.mlp.gate_proj.weight"][1]
    np.testing.assert_array_equal(gate, read_raw(source)["ernie.layers.0.mlp.up_gate_proj.weight"][1][:, :96].T)
    config = json.loads((tmp_path / "pt" / "config.json").read_bytes())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config
    assert config["compression_ratio"] == 1.0  # unknown keys are kept
    moe = "moe" in case
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM" if moe else "Ernie4_5ForCausalLM"]
    assert config["model_type"] == ("ernie4_5_moe" if moe else "ernie4_5")
    assert config["head_dim"] == 16
    generation = "generation_config.json"
    assert (tmp_path / "pt" / generation).read_bytes() == (source / generation).read_bytes()


def test_a_routed_bfloat16_file_comes_back_in_bfloat16(golden, tmp_path, read_raw):
    """Older -Paddle files hold routers in U16: fp32 in -PT, and back again."""
    convert(golden / "moe/shared_tied/paddle", tmp_path / "pt", to="pt")
    assert read_raw(tmp_path / "pt")["model.layers.1.mlp.gate.weight"][0] == "F32"
    convert(tmp_path / "pt", tmp_path / "back", to="paddle")
    assert read_raw(tmp_path / "back")["ernie.layers.1.mlp.gate.weight"][0] == "U16"


def test_a_pt_folder_without_origin_becomes_a_usual_paddle_folder(model, tmp_path, read_raw):
    convert(model(), tmp_path / "paddle", to="paddle")
    raw = read_raw(tmp_path / "paddle")
    assert {tag for name, (tag, _) in raw.items() if "gate.weight" not in name and "bias" not in name} == {"U16"}
    assert raw["ernie.layers.1.mlp.gate.weight"][0] == "F32"
    assert "lm_head.weight" not in raw
    config = json.loads((tmp_path / "paddle" / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


def test_a_pdparams_folder_is_converted(model, tmp_path, read_raw):
    source = model(layout="paddle", dtype="float32")
    state = {name: paddle.to_tensor(array.copy()) for name, (_, array) in read_raw(source).items()}
    paddle.save(state, str(source / "model_state.pdparams"))
    original = read_raw(source)
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "pt", to="pt")
    convert(tmp_path / "pt", tmp_path / "back", to="paddle")
    for name, (_, array) in read_raw(tmp_path / "back").items():
        np.testing.assert_array_equal(array, original[name][1])


def test_shards_have_an_index_and_respect_the_limit(model, tmp_path):
    convert(model(), tmp_path / "paddle", to="paddle", max_shard_bytes=60_000)
    shards = sorted((tmp_path / "paddle").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert verify(tmp_path / "paddle") == []
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) < 80_000  # the embedding alone is 65,536


# ---------------------------------------------------------------------- the origin is a hint
def test_finer_values_are_never_rounded_to_an_original_format(golden, tmp_path, change, capsys):
    convert(golden / "moe/shared_tied/paddle", tmp_path / "pt", to="pt")
    gate = "model.layers.1.mlp.gate.weight"

    def train(tensors):
        tensors[gate] = ("F32", tensors[gate][1] + np.float32(1e-4))

    change(tmp_path / "pt", train)
    trained = Folder.open(tmp_path / "pt").read_atom(gate).copy()
    convert(tmp_path / "pt", tmp_path / "back", to="paddle")
    np.testing.assert_array_equal(Folder.open(tmp_path / "back").read_atom(gate), trained)
    assert "1 tensor(s) were bfloat16 originally" in capsys.readouterr().err


def test_a_changed_config_is_converted_not_restored(golden, tmp_path, change):
    convert(golden / "paddle_real/moe_shared", tmp_path / "pt", to="pt")
    change(tmp_path / "pt", rope_theta=10000)
    convert(tmp_path / "pt", tmp_path / "back", to="paddle")
    assert json.loads((tmp_path / "back" / "config.json").read_bytes())["rope_theta"] == 10000


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "not JSON",
        lambda origin: json.dumps(origin | {"form": {"head": True, "unknown": 1}}),
        lambda origin: json.dumps(
            origin | {"files": {"../../outside.safetensors": origin["files"]["model.safetensors"]}}
        ),
        lambda origin: json.dumps(origin | {"files": {"model.safetensors": {"a": "F31"}}}),
        lambda origin: json.dumps(origin | {"files": {"model.safetensors": {"ernie.norm.weight": "F32"}}}),
        lambda origin: json.dumps(origin | {"metadata": {}}),
        lambda origin: json.dumps(origin | {"metadata": {"model.safetensors": {"format": 5}}}),
        lambda origin: json.dumps(origin | {"config_json": 5}),
        lambda origin: json.dumps(origin | {"files": [1, 2]}),
        lambda _: json.dumps([1, 2]),
    ],
)
def test_an_origin_that_does_not_fit_is_not_used(golden, tmp_path, capsys, spoil):
    convert(golden / "paddle_real/dense_tied", tmp_path / "in" / "pt", to="pt")
    path = tmp_path / "in" / "pt" / ORIGIN
    path.write_text(spoil(json.loads(path.read_bytes())))
    convert(tmp_path / "in" / "pt", tmp_path / "in" / "back", to="paddle")
    assert ORIGIN in capsys.readouterr().err
    assert "tie_word_embeddings" in (tmp_path / "in" / "back" / "config.json").read_text()
    Folder.open(tmp_path / "in" / "back").check()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in"]


# ---------------------------------------------------------------------- refusals
def test_a_target_that_is_not_empty_is_refused_untouched(model, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(model(), target, to="paddle")
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    convert(model(name="second"), target, to="paddle")  # an empty folder is fine
    assert verify(target) == []


def test_an_unknown_layout_and_a_damaged_source(model, tmp_path, change):
    source = model()
    with pytest.raises(CheckpointError, match="unknown layout 'onnx'"):
        convert(source, tmp_path / "out", to="onnx")
    change(source, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        convert(source, tmp_path / "out", to="paddle")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
    source, calls = model(), []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="disk is full"):
        convert(source, tmp_path / "new" / "out", to="paddle", max_shard_bytes=60_000)
    assert len(calls) >= 3
    assert not (tmp_path / "new").exists()


def test_an_interrupted_conversion_leaves_nothing_behind(model, tmp_path, monkeypatch):
    from erniekit.checkpoint import save

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "index_content", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(model(), tmp_path / "out", to="paddle", max_shard_bytes=60_000)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_conversion_left_does_not_stand_in_the_way(model, tmp_path):
    left = tmp_path / "out" / ".saving"
    left.mkdir(parents=True)
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    convert(model(), tmp_path / "out", to="paddle")
    assert verify(tmp_path / "out") == []
    assert not left.exists()


# ---------------------------------------------------------------------- memory
_MEASURED = """
import sys
from erniekit.checkpoint.convert import convert

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

before = memory("VmRSS")
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_a_few_tensors_not_the_model(tmp_path, write_raw):
    """A model of 200 MB whose largest tensor has 12.6 MB, converted both ways in processes of their own."""
    hidden, layers = 1024, 8
    config = dict(
        model_type="ernie4_5", vocab_size=256, hidden_size=hidden, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    source = tmp_path / "paddle"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    tensors = {"ernie.embed_tokens.weight": (256, hidden), "ernie.norm.weight": (hidden,)}
    for i in range(layers):
        tensors |= {
            f"ernie.layers.{i}.self_attn.qkv_proj.weight": (hidden, 1536),
            f"ernie.layers.{i}.self_attn.o_proj.weight": (hidden, hidden),
            f"ernie.layers.{i}.mlp.up_gate_proj.weight": (hidden, 6144),
            f"ernie.layers.{i}.mlp.down_proj.weight": (3072, hidden),
            f"ernie.layers.{i}.input_layernorm.weight": (hidden,),
            f"ernie.layers.{i}.post_attention_layernorm.weight": (hidden,),
        }
    zeros = {name: ("U16", np.zeros(shape, np.uint16)) for name, shape in tensors.items()}
    write_raw(source / "model.safetensors", zeros)
    size = (source / "model.safetensors").stat().st_size
    assert size > 190e6
    largest = max(array.nbytes for _, array in zeros.values())
    for start, target, to in ((source, tmp_path / "pt", "pt"), (tmp_path / "pt", tmp_path / "back", "paddle")):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, str(start), str(target), to],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak = int(done.stdout)
        assert peak < 6 * largest, f"{to}: {peak} bytes, largest tensor {largest}, model {size}"


@pytest.mark.parametrize(("layout", "to"), [("pt", "paddle"), ("paddle", "pt")])
def test_every_page_that_was_read_is_released(model, tmp_path, monkeypatch, layout, to):
    released = set()
    monkeypatch.setattr(Folder, "release", lambda _, atom: released.add(atom))
    convert(model(layout=layout), tmp_path / "out", to=to)
    assert released == Folder.open(tmp_path / "out").table.atoms.keys()


def test_bfloat16_bits_survive_both_ways(tmp_path, write_raw, golden, read_raw, change):
    """Signed zeros, subnormals, infinities and NaNs with payload come back as they were."""
    source = tmp_path / "source"
    shutil.copytree(golden / "paddle_real" / "dense_tied_bf16_u16", source)
    name = "ernie.layers.0.mlp.up_gate_proj.weight"

    def all_patterns(tensors):
        tag, array = tensors[name]
        tensors[name] = (tag, np.resize(np.arange(0, 65536, 7, dtype=np.uint16), array.shape))

    change(source, all_patterns)
    convert(source, tmp_path / "pt", to="pt")
    convert(tmp_path / "pt", tmp_path / "back", to="paddle")
    np.testing.assert_array_equal(read_raw(tmp_path / "back")[name][1], read_raw(source)[name][1])
