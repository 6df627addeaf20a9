"""What goes into every weight, layer by layer, beside the whole model watched from outside."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.checkpoint.create import create
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_for_answers
from erniekit.config import families
from erniekit.models.layers import Linear
from erniekit.models.moe import Experts
from erniekit.ops.mlp import gated
from erniekit.rollout.calibration import calibrate
from erniekit.rollout.merge_proof import token_rows

ROWS = [*token_rows(np.random.default_rng(4).integers(3, 500, [3, 40]).tolist()), np.array([7, 8, 9])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    path = tmp_path_factory.mktemp("models") / "moe"
    create("micro-moe", path, seed=3, dtype="float32")
    return Folder.open(path)


@pytest.fixture(scope="module")
def seen(folder):
    return calibrate(folder, folder, ROWS, progress=lambda *_: None)


@paddle.no_grad()
def watched(folder: Folder) -> tuple[dict[str, np.ndarray], object]:
    """All rows that go into each layer and each expert of the whole model."""
    model, inputs = load_for_answers(folder.path), {}

    def keep(name, rows):
        inputs.setdefault(name, []).append(rows.numpy().reshape(-1, rows.shape[-1]))

    def experts(name):
        def hook(layer, given):
            rows, start = given[0], 0
            for index, count in enumerate(given[1]):
                own = rows[start : start + count]
                keep(f"{name}.{index}.gate_up", own)
                keep(f"{name}.{index}.down", gated(paddle.matmul(own, layer.gate_up_proj[index])))
                start += count

        return hook

    for name, layer in model.named_sublayers():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(lambda _layer, given, name=name: keep(name, given[0]))
        elif isinstance(layer, Experts):
            layer.register_forward_pre_hook(experts(name))
    for row in ROWS:
        model(paddle.to_tensor(row[None]))
    return {name: np.concatenate(rows) for name, rows in inputs.items()}, model


def test_every_weight_saw_what_went_into_it(folder, seen):
    inputs, _ = watched(folder)
    names = {
        "q_proj": "qkv_proj", "gate_proj": "up_gate_proj", "gate_up": "up_gate_proj", "down": "down_proj",
        "o_proj": "o_proj", "down_proj": "down_proj",
    }  # fmt: skip
    compared = 0
    for name, rows in inputs.items():
        path, _, last = name.rpartition(".")
        if last not in names or not len(rows):
            continue
        stored = f"{path.replace('model.', 'ernie.', 1)}.{names[last]}.weight"
        squares = np.square(rows.astype(np.float64)).mean(0)
        assert seen.largest[stored] == pytest.approx(np.abs(rows).max(), rel=1e-4)
        np.testing.assert_allclose(seen.squares[stored], squares, rtol=1e-3)
        compared += 1
    assert compared > 20 and seen.tokens == sum(map(len, ROWS))


def test_an_expert_that_saw_nothing_has_what_the_others_saw(folder):
    few = calibrate(folder, folder, [np.array([5])], progress=lambda *_: None)
    largest = [few.largest[f"ernie.layers.1.mlp.experts.{index}.down_proj.weight"] for index in range(4)]
    assert len(set(largest)) == 2 and largest.count(max(largest)) == 3  # of two experts a token, the larger thrice


@paddle.no_grad()
def test_scales_of_the_cache_are_its_largest_numbers(folder, seen):
    """Against the cache of a model that generates: keys are turned there."""
    model = load_for_answers(folder.path)
    largest = {}
    for row in ROWS:
        cache = model.new_cache()
        model.step(paddle.to_tensor(row[None]), cache)
        for number, layer in enumerate(cache.layers):
            for which, tensor in zip(("cachek", "cachev"), layer.held, strict=True):
                found = np.abs(tensor.numpy()[:, :, : len(row)]).max((0, 2)).reshape(-1)
                name = f"ernie.layers.{number}.self_attn.{which}_matmul.activation_scale"
                largest[name] = np.maximum(largest.get(name, found), found)
    assert largest.keys() == seen.cache.keys()
    for name, expected in largest.items():
        np.testing.assert_allclose(seen.cache[name], expected, rtol=1e-4)


def test_statistics_come_back_from_their_file(seen, tmp_path):
    seen.write(tmp_path / "kept")
    again = type(seen).read(tmp_path / "kept")
    assert again.tokens == seen.tokens and again.largest == seen.largest
    for kept, first in ((again.squares, seen.squares), (again.cache, seen.cache)):
        assert {name: value.tobytes() for name, value in kept.items()} == {
            name: value.tobytes() for name, value in first.items()
        }


def test_prediction_ahead_is_watched_too(tmp_path, monkeypatch):
    ahead = families.FAMILIES["micro-moe"] | {"num_nextn_predict_layers": 1}
    monkeypatch.setitem(families.FAMILIES, "micro-ahead", ahead)
    create("micro-ahead", tmp_path / "mtp", dtype="float32")
    folder = Folder.open(tmp_path / "mtp")
    seen = calibrate(folder, folder, ROWS, progress=lambda *_: None)
    for name in ("mtp_linear_proj.0", "mtp_block.0.self_attn.qkv_proj", "mtp_block.0.mlp.down_proj"):
        assert seen.largest[f"ernie.{name}.weight"] > 0


def test_numbers_that_are_not_finite_are_not_lost(folder):
    """They stand in the scales, where the export finds them."""

    class Spoilt:
        def read(self, atom):
            return folder.read(atom) * (np.nan if atom == "model.layers.1.self_attn.v_proj.weight" else 1)

        def release(self, atom):
            folder.release(atom)

    seen = calibrate(folder, Spoilt(), ROWS, progress=lambda *_: None)
    assert np.isfinite(seen.largest["ernie.layers.1.self_attn.qkv_proj.weight"])
    assert np.isnan(seen.largest["ernie.layers.1.self_attn.o_proj.weight"])
    assert np.isnan(seen.cache["ernie.layers.1.self_attn.cachev_matmul.activation_scale"]).all()
