"""Adapters merged into their base: what other implementations computed with merged weights, and merges of several."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.adapter import memory_adapter
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_save import write_adapter
from erniekit.checkpoint.convert import write_converted
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import SafetensorsFile
from erniekit.checkpoint.load import load_model
from erniekit.checkpoint.merge import METHODS, Merged, Recipe
from erniekit.config.adapter import AdapterConfig

CASES = {
    "moe": ("peft/moe", "moe/shared_tied/pt", "peft/moe/expected", ("input_ids", "logits")),
    "dora": ("peft/dora", "dense/untied_bias/pt", "peft/dora/expected", ("input_ids", "logits")),
    "erniekit": ("paddle_real/lora_moe_shared", "paddle_real/moe_shared", "paddle_real/lora_moe_shared/io",
                 ("in.input_ids", "merged_logits")),
}  # fmt: skip


@pytest.fixture
def merged(golden):
    def make(case: str, recipe: Recipe | None = None) -> Merged:
        adapter, base = AdapterFolder.open(golden / CASES[case][0]), Folder.open(golden / CASES[case][1])
        count = len((recipe or Recipe()).weights)
        return Merged(base, [adapter.on(base.disk_config)] * count, recipe)

    return make


@pytest.mark.parametrize("to", ["pt", "paddle"])
@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_has_the_logits_of_the_adapted_model(golden, merged, tmp_path, case, to):
    source = merged(case)
    write_converted(tmp_path / "out", source.base, to=to, source=source)
    file = SafetensorsFile(golden / f"{CASES[case][2]}.safetensors")
    ids, wanted = (np.array(file.read(name)) for name in CASES[case][3])
    with paddle.no_grad():
        found = load_model(tmp_path / "out")(paddle.to_tensor(ids)).numpy()
    assert np.abs(found - wanted).max() <= 2e-5


def test_a_bfloat16_base_stays_one_and_is_rounded_once(tmp_path, model):
    folder = model("micro-dense", dtype="bfloat16")
    base = Folder.open(folder)
    rng = np.random.default_rng(0)
    atom = "model.layers.0.self_attn.q_proj.weight"
    out, into = base.table.atoms[atom].shape
    stem = f"base_model.model.{atom.removesuffix('.weight')}"
    a, b = rng.standard_normal((2, into), np.float32), rng.standard_normal((out, 2), np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    source = Merged(base, [AdapterFolder.open(adapter).on(base.disk_config)])
    write_converted(tmp_path / "out", base, to="pt", source=source)
    after, before = Folder.open(tmp_path / "out"), base.read_tensor(atom).astype(np.float64)
    exact = before + 1.5 * b.astype(np.float64) @ a
    assert after.tag(atom) == "BF16"
    error = np.abs(after.read_tensor(atom).astype(np.float64) - exact)
    assert (error <= np.abs(exact) * 2.0**-8 + 1e-6).all()  # half a unit of bfloat16's last place
    same = [name for name in base.names if name != atom]
    assert all(np.array_equal(after.read_tensor(name), base.read_tensor(name)) for name in same)


# ---------------------------------------------------------------------- several
ONE, TWO = np.float32([[4, -1, 0.5, 2]]), np.float32([[-1, -3, 2, 0.25]])


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (Recipe((0.7, 0.3)), [[2.5, -1.6, 0.95, 1.475]]),
        # half of each: (4, 2) and (-3, 2); signs of the sums + - + +; where one agrees it is not divided
        (Recipe((0.7, 0.3), "ties", 0.5), [[2.8, -0.9, 0.6, 1.4]]),
        # all of each: signs + - + +; the second number of both agrees, and the third, and the fourth
        (Recipe((0.7, 0.3), "ties", 1.0), [[2.8, -0.8, 0.475, 0.7375]]),
        # signs are elected before weights count: the first number of the second adapter does not outweigh
        (Recipe((0.1, 0.9), "ties", 1.0), [[0.4, -1.4, 0.925, 0.2125]]),
        (Recipe((0.7, 0.3), "dare", 1.0), [[2.5, -1.6, 0.95, 1.475]]),
        (Recipe((0.7, 0.3), "dare_ties", 1.0), [[2.8, -0.8, 0.475, 0.7375]]),
    ],
)
def test_methods_by_hand(recipe, wanted):
    np.testing.assert_allclose(recipe.combined([ONE, TWO], "atom"), wanted, rtol=1e-6)


def test_dare_keeps_the_mean_and_is_drawn_from_the_seed():
    ones = np.ones((400, 500), np.float32)
    recipe = Recipe((1.0,), "dare", 0.25, seed=3)
    found = recipe.combined([ones], "atom")
    assert set(np.unique(found)) == {0.0, 4.0} and abs(found.mean() - 1) < 0.02
    assert np.array_equal(found, recipe.combined([ones], "atom"))
    assert not np.array_equal(found, recipe.combined([ones], "another"))
    assert not np.array_equal(found, dataclasses.replace(recipe, seed=4).combined([ones], "atom"))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_with_itself(merged, method):
    """Two equal adapters that weigh one together are the one (ties averages them)."""
    recipe = Recipe((0.5, 0.5) if method in ("linear", "dare") else (1.0, 1.0), method, 1.0)
    source, once = merged("moe", recipe), merged("moe")
    for atom in once.base.table.atoms:
        np.testing.assert_allclose(source.read(atom), once.read(atom), rtol=0, atol=1e-6)


def test_adapters_with_different_targets_are_refused(golden, merged):
    source = merged("moe")
    one = source.adapters[0]
    fewer = dataclasses.replace(
        one,
        name="other",
        config=dataclasses.replace(one.config, targets=one.config.targets[1:], modules_to_save=("m",)),
    )
    with pytest.raises(CheckpointError) as error:
        Merged(source.base, [one, fewer], Recipe((1.0, 1.0)))
    assert f"adapts '{one.config.targets[0]}', and other does not" in str(error.value)
    assert "other holds the whole of 'm'" in str(error.value)
    with pytest.raises(ConfigError, match="density 0"):
        Recipe((1.0,), "ties", 0.0)


def test_adapters_of_multi_token_prediction_are_merged(golden, tmp_path):
    base = Folder.open(golden / "paddle_real" / "moe_mtp")
    target, rng = "model.mtp_block.0.self_attn.v_proj", np.random.default_rng(0)
    config = AdapterConfig(rank=2, alpha=2, targets=(target,))
    atom = f"{target}.weight"
    out, into = base.table.atoms[atom].shape
    a, b = rng.standard_normal((into, 2)).astype(np.float32), rng.standard_normal((2, out)).astype(np.float32)
    arrays = {f"{target}.adapter.lora_A": a, f"{target}.adapter.lora_B": b}
    adapter = memory_adapter(config, arrays, memory_table(base.config, head_bias=False))
    write_adapter(tmp_path / "adapter", adapter, form="erniekit", base=base, dtype="float32")
    again = AdapterFolder.open(tmp_path / "adapter").on(base.disk_config, mtp_layers=base.form.mtp_layers)
    write_converted(tmp_path / "out", base, to="pt", source=Merged(base, [again]))
    merged = Folder.open(tmp_path / "out")
    merged.check()
    assert merged.form.mtp_layers == base.form.mtp_layers == 1
    np.testing.assert_allclose(merged.read_atom(atom), base.read_atom(atom) + b.T @ a.T, rtol=0, atol=1e-6)
    others = [name for name in base.table.atoms if name != atom]
    assert all(np.array_equal(merged.read_atom(name), base.read_atom(name)) for name in others)
