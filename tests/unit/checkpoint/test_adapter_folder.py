"""Adapter folders as PEFT and ERNIEKit wrote them, read and written again; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.adapter import Adapter, memory_adapter
from erniekit.checkpoint.adapter_folder import AdapterFolder, mark_of
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.adapter_save import write_adapter
from erniekit.checkpoint.convert import convert
from erniekit.checkpoint.ernie45 import EMBEDDING, memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.manifest import check_manifest
from erniekit.checkpoint.pdparams import read_pdparams
from erniekit.checkpoint.split import split
from erniekit.checkpoint.verify import verify
from erniekit.config.adapter import AdapterConfig


@pytest.fixture(scope="session")
def cases(golden) -> dict[str, tuple[Path, Path]]:
    """Adapter and base of each case."""
    return {
        "moe": (golden / "peft" / "moe", golden / "moe" / "shared_tied" / "pt"),
        "dora": (golden / "peft" / "dora", golden / "dense" / "untied_bias" / "pt"),
        "erniekit": (golden / "paddle_real" / "lora_moe_shared", golden / "paddle_real" / "moe_shared"),
    }


def deltas(adapter: Adapter, base: Folder) -> dict[str, np.ndarray]:
    """What the adapter makes of every atom that it touches."""
    return {
        atom: adapter.applied(atom, base.read_atom(atom).astype(np.float32))
        for atom in base.table.atoms
        if adapter.touches(atom)
    }


@pytest.fixture
def opened(cases):
    def open_case(name: str) -> tuple[AdapterFolder, Folder]:
        adapter, base = cases[name]
        return AdapterFolder.open(adapter), Folder.open(base)

    return open_case


def test_a_peft_folder_comes_back_as_it_was(opened, read_raw, tmp_path, golden):
    folder, base = opened("moe")
    write_adapter(tmp_path / "again", folder.on(base.disk_config), form="peft", base=base, dtype="float32")
    file = "adapter_model.safetensors"
    before, after = read_raw(golden / "peft" / "moe" / file), read_raw(tmp_path / "again" / file)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name][1], after[name][1]) for name in before)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert sorted(config["target_parameters"]) == [
        "down_proj", "gate_up_proj", "mlp.gate_proj.weight", "shared_experts.up_proj.weight",
    ]  # fmt: skip
    assert check_manifest(tmp_path / "again") == []


def test_an_erniekit_folder_comes_back_as_it_was(opened, read_raw, tmp_path, golden):
    folder, base = opened("erniekit")
    write_adapter(tmp_path / "again", folder.on(base.disk_config), form="erniekit", base=base, dtype="float32")
    before = read_pdparams(golden / "paddle_real" / "lora_moe_shared" / "lora_model_state.pdparams")
    after = read_raw(tmp_path / "again" / "peft_model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name][1]) for name in before)
    config = json.loads((tmp_path / "again" / "lora_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["scaling"]) == (4, 8, 2.0)
    assert config["target_modules"] == [".*down_proj.*", ".*o_proj.*", ".*qkv_proj.*", ".*up_gate_proj.*"]


@pytest.mark.parametrize("form", ["peft", "erniekit"])
def test_erniekits_adapter_means_the_same_in_either_form_and_layout(opened, tmp_path, form):
    folder, base = opened("erniekit")
    convert(base.path, tmp_path / "pt", to="pt")
    pt = Folder.open(tmp_path / "pt")
    assert mark_of(pt) == mark_of(base)
    write_adapter(tmp_path / "again", folder.on(base.disk_config), form=form, base=pt, dtype="float32")
    again = AdapterFolder.open(tmp_path / "again")
    assert again.base_mark == mark_of(base) and again.config.targets == folder.config.targets
    before, after = deltas(folder.on(base.disk_config), base), deltas(again.on(pt.disk_config), pt)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[atom], after[atom]) for atom in before)


def test_projections_trained_apart_become_one_adapter_of_three_times_the_rank(opened, tmp_path):
    folder, base = opened("moe")
    adapter = folder.on(base.disk_config)
    write_adapter(tmp_path / "again", adapter, form="erniekit", base=base, dtype="float32")
    again = AdapterFolder.open(tmp_path / "again")
    assert again.config.rank == 2 * folder.config.rank  # q and v of q|k|v
    assert again.config.scaling == folder.config.scaling
    before, after = deltas(adapter, base), deltas(again.on(base.disk_config), base)
    assert all(np.array_equal(array, after[atom]) for atom, array in before.items())
    weights = {atom: base.read_atom(atom) for atom in after.keys() - before.keys()}
    assert weights and all(np.array_equal(after[atom], weights[atom]) for atom in weights)  # k: nothing is added


def test_ranks_and_scalings_of_their_own_become_one(opened):
    folder, base = opened("dora")
    assert (folder.config.rank, folder.config.rslora, folder.config.dora) == (6, True, True)
    assert folder.config.scaling == pytest.approx(4.0) and folder.config.modules_to_save == ("lm_head",)
    adapter, table = folder.on(base.disk_config), memory_table(base.config, head_bias=False)
    memory = dict(adapter.in_memory(table)) | {"lm_head.weight": base.read_tensor("lm_head.weight")}
    assert memory["model.layers.0.self_attn.q_proj.adapter.lora_A"].shape == (48, 6)
    assert not memory["model.layers.0.self_attn.v_proj.adapter.lora_A"][:, 4:].any()
    again = memory_adapter(folder.config, memory, table)
    for atom in adapter.low_rank:
        weight = base.read_atom(atom)
        np.testing.assert_allclose(again.applied(atom, weight), adapter.applied(atom, weight), rtol=0, atol=1e-6)


def test_the_model_in_memory_holds_the_same(opened):
    for name in ("moe", "erniekit"):
        folder, base = opened(name)
        adapter, table = folder.on(base.disk_config), memory_table(base.config, head_bias=False)
        again = memory_adapter(folder.config, dict(adapter.in_memory(table)), table)
        before, after = deltas(adapter, base), deltas(again, base)
        assert all(np.array_equal(before[atom], after[atom]) for atom in before), name


def test_experts_named_one_by_one_as_older_transformers_has_them(opened, read_raw, write_raw, tmp_path, golden):
    shutil.copytree(golden / "peft" / "moe", tmp_path / "adapter")
    generator, tensors = np.random.default_rng(0), {}
    shapes = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
    for expert in range(8):
        for name, (out, into) in shapes.items():
            stem = f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}"
            tensors[f"{stem}.lora_A.weight"] = ("F32", generator.standard_normal((4, into), np.float32))
            tensors[f"{stem}.lora_B.weight"] = ("F32", generator.standard_normal((out, 4), np.float32))
    write_raw(tmp_path / "adapter" / "adapter_model.safetensors", tensors)
    folder, base = AdapterFolder.open(tmp_path / "adapter"), opened("moe")[1]
    assert (folder.config.rank, folder.config.scaling) == (8, 2.0)  # gate and up have an A each
    head = "model.layers.1.mlp.experts"
    assert folder.config.targets == (f"{head}.down_proj", f"{head}.gate_up_proj")
    table = memory_table(base.config, head_bias=False)
    memory = dict(folder.on(base.disk_config).in_memory(table))
    again = memory_adapter(folder.config, memory, table)
    for expert, name in ((0, "gate_proj"), (5, "up_proj"), (7, "down_proj")):
        stem, atom = f"base_model.model.{head}.{expert}.{name}", f"{head}.{expert}.{name}.weight"
        wanted = 2.0 * tensors[f"{stem}.lora_B.weight"][1] @ tensors[f"{stem}.lora_A.weight"][1]
        np.testing.assert_allclose(again.applied(atom, np.zeros_like(wanted)), wanted, rtol=0, atol=1e-5)


def test_tensors_of_the_reference_library_are_read(golden, tmp_path, read_raw, write_raw):
    """Weights as PEFT itself merged them."""
    raw = read_raw(golden / "dpo" / "lora.safetensors")
    (tmp_path / "adapter").mkdir()
    write_raw(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {name: value for name, value in raw.items() if ".lora_" in name},
    )
    base = Folder.open(golden / "dense" / "tied" / "pt")
    for case, rslora in (("lora_r4_a8_all_linear", False), ("rslora_r4_a8", True)):
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": rslora}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        adapter = AdapterFolder.open(tmp_path / "adapter").on(base.disk_config)
        atom = "model.layers.0.self_attn.q_proj.weight"
        wanted = raw[f"{case}.merged.layers.0.q_proj"][1]
        np.testing.assert_allclose(adapter.applied(atom, base.read_atom(atom)), wanted, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- bad input
@pytest.fixture
def damaged(golden, tmp_path, read_raw, write_raw):
    """A copy of a case with tensors or settings changed."""

    def make(case: str = "moe", edit=None, drop: tuple[str, ...] = (), **settings) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(golden / "peft" / case, folder)
        raw = {n: v for n, v in read_raw(folder / "adapter_model.safetensors").items() if n not in drop}
        for name, (tag, array) in (edit(raw) if edit else {}).items():
            raw[name] = (tag, array)
        write_raw(folder / "adapter_model.safetensors", raw)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    return make


Q = "base_model.model.model.layers.1.self_attn.q_proj"


def moved(raw, stem: str) -> dict:
    """The adapter of Q under another module's name."""
    return {f"{stem}.lora_{part}.weight": raw[f"{Q}.lora_{part}.weight"] for part in "AB"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": "all"}, "bias: 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"use_qalora": True}, "use_qalora: True"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: [3]"),
        ({"r": 0}, "rank 0"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"use_dora": True}, "lacks its lora_magnitude_vector"),
        ({"drop": (f"{Q}.lora_B.weight",)}, "lacks its lora_B"),
        ({"edit": lambda raw: {"base_model.model.lm_head.lora_embedding_A": raw[f"{Q}.lora_A.weight"]}}, "understood"),
        ({"edit": lambda raw: {"model.norm.weight": raw[f"{Q}.lora_A.weight"]}}, "is not understood"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(damaged, change, words):
    with pytest.raises(CheckpointError) as error:
        AdapterFolder.open(damaged(**change))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 8}, "has shape [4, 48]; [8, 48] is needed"),
        ({"edit": lambda _: {f"{Q}.lora_A.weight": ("F32", np.zeros((4, 32), np.float32))}}, "has shape [4, 32]"),
        ({"edit": lambda raw: moved(raw, Q.replace(".1.", ".9."))}, "adapts no linear layer"),
        ({"edit": lambda raw: moved(raw, "base_model.model.lm_head")}, "lm_head.lora_A.weight' adapts no linear layer"),
        ({"edit": lambda raw: {"base_model.model.pooler.weight": raw[f"{Q}.lora_A.weight"]}}, "of no module"),
    ],
)  # fmt: skip
def test_an_adapter_for_another_model_is_told_tensor_by_tensor(damaged, golden, change, words):
    base = Folder.open(golden / "moe" / "shared_tied" / "pt")
    with pytest.raises(CheckpointError) as error:
        folder = AdapterFolder.open(damaged(**change))
        folder.on(base.disk_config)
    assert words in str(error.value) and "made for moe/shared_tied/pt" in str(error.value)


def test_numbers_that_are_none_are_found(damaged, golden):
    folder = damaged(edit=lambda _: {f"{Q}.lora_B.weight": ("F32", np.full((48, 4), np.nan, np.float32))})
    base = Folder.open(golden / "moe" / "shared_tied" / "pt")
    with pytest.raises(CheckpointError, match="holds NaN"):
        deltas(AdapterFolder.open(folder).on(base.disk_config), base)
    assert [problem.partition("tensor ")[2] for problem in verify(folder)] == [
        f"'{Q}.lora_B.weight' holds NaN or infinite numbers."
    ]


def test_an_adapter_folder_is_verified_and_is_no_model(opened, golden, tmp_path, damaged):
    assert verify(golden / "peft" / "dora") == [] and verify(golden / "paddle_real" / "lora_moe_shared") == []
    folder, base = opened("moe")
    write_adapter(tmp_path / "again", folder.on(base.disk_config), form="peft", base=base, dtype="bfloat16")
    assert verify(tmp_path / "again") == []
    config = tmp_path / "again" / "adapter_config.json"
    config.write_text(config.read_text().replace("moe/shared_tied", "dense/untied_bias"))
    found = verify(tmp_path / "again")
    assert "manifest.json says" in found[0] and "it does not fit" in found[1]
    for use in (convert, split):
        with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
            use(tmp_path / "again", tmp_path / "out", **({"to": "pt"} if use is convert else {"max_shard_bytes": 9}))


def test_folders_that_hold_no_adapter(golden, tmp_path, damaged):
    base = golden / "moe" / "shared_tied" / "pt"
    assert not is_adapter(base) and is_adapter(golden / "peft" / "moe")
    with pytest.raises(CheckpointError, match="holds a whole model: give it as model_name_or_path"):
        AdapterFolder.open(base)
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        AdapterFolder.open(tmp_path / "absent")
    folder = damaged()
    (folder / "lora_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="which adapter is meant"):
        AdapterFolder.open(folder)
    (folder / "lora_config.json").unlink()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        AdapterFolder.open(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle, which could execute code"):
        AdapterFolder.open(folder)


def test_shards_and_settings_of_erniekit_that_are_not_followed(golden, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(golden / "paddle_real" / "lora_moe_shared", folder)
    config = folder / "lora_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"loraga": True, "trainable_bias": "all"}))
    with pytest.raises(CheckpointError) as error:
        AdapterFolder.open(folder)
    assert len(error.value.problems) == 2 and "loraga: True" in str(error.value)
    config.write_text(json.dumps(settings))
    (folder / "lora_model_state.pdparams").rename(folder / "lora_model_state.tp00.pdparams")
    with pytest.raises(CheckpointError, match="tensor-parallel"):
        AdapterFolder.open(folder)


def test_an_embedding_that_is_the_head_is_stored_twice_for_peft(golden, tmp_path, read_raw, write_raw, capsys):
    base = Folder.open(golden / "dense" / "tied" / "pt")
    target, rng = "model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    config = AdapterConfig(rank=1, alpha=1, targets=(target,), modules_to_save=("model.embed_tokens",))
    shapes = {f"{target}.adapter.lora_A": (48, 1), f"{target}.adapter.lora_B": (1, 64), EMBEDDING: (160, 48)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    adapter = memory_adapter(config, arrays, memory_table(base.config, head_bias=False))
    write_adapter(tmp_path / "peft", adapter, form="peft", base=base, dtype="float32")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    raw = read_raw(file)
    head, embedding = (raw[f"base_model.model.{name}"][1] for name in ("lm_head.weight", EMBEDDING))
    assert np.array_equal(head, arrays[EMBEDDING]) and np.array_equal(embedding, head)
    again = AdapterFolder.open(tmp_path / "peft")
    assert again.config.modules_to_save == config.modules_to_save
    assert set(again.on(base.disk_config).whole) == {EMBEDDING} and capsys.readouterr().err == ""
    write_raw(file, raw | {"base_model.model.lm_head.weight": ("F32", head + 1)})
    with pytest.raises(CheckpointError, match="it is no copy of the embedding"):
        AdapterFolder.open(tmp_path / "peft").on(base.disk_config)
    settings = tmp_path / "peft" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"ensure_weight_tying": true', '"ensure_weight_tying": false'))
    write_raw(file, {name: value for name, value in raw.items() if "lm_head" not in name})
    AdapterFolder.open(tmp_path / "peft").on(base.disk_config)
    assert "PEFT went on with the old head" in capsys.readouterr().err


def test_a_projection_that_ends_in_a_number_is_named_whole(golden, tmp_path):
    base = Folder.open(golden / "paddle_real" / "moe_mtp")
    table = memory_table(base.disk_config, head_bias=False)
    target = "model.mtp_linear_proj.0"
    into, out = table.tensors[f"{target}.weight"].shape
    arrays = {f"{target}.adapter.lora_A": np.ones((into, 2), np.float32)}
    arrays[f"{target}.adapter.lora_B"] = np.ones((2, out), np.float32)
    adapter = memory_adapter(AdapterConfig(rank=2, alpha=2, targets=(target,)), arrays, table)
    for form, file in (("peft", "adapter_config.json"), ("erniekit", "lora_config.json")):
        write_adapter(tmp_path / form, adapter, form=form, base=base, dtype="float32")
        wanted = "mtp_linear_proj.0" if form == "peft" else r"ernie\.mtp_linear_proj\.0"
        assert json.loads((tmp_path / form / file).read_text())["target_modules"] == [wanted]
        again = AdapterFolder.open(tmp_path / form).on(base.disk_config, mtp_layers=1)
        found = again.applied(f"{target}.weight", np.zeros((out, into), np.float32))
        assert np.array_equal(found, np.full((out, into), 2, np.float32))
