"""Our model against outputs that other implementations stored (tests/data/golden/README.md), in every layout.

dense/* and moe/* come from transformers (gradients under its in-memory names), paddle_real/* from the real ERNIEKit
(gradients under -Paddle names). Tolerances: logits 2e-5, loss 1e-6 relative, gradients max|d|/max|g| <= 1e-5 for each
tensor.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from erniekit.checkpoint.convert import convert
from erniekit.checkpoint.ernie45 import Form, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_model
from erniekit.checkpoint.model_io import build_model
from erniekit.checkpoint.source import Memory
from erniekit.data.batch import Batch
from erniekit.losses.router import balance_loss, orthogonal_loss, z_loss
from erniekit.ops.attention import end_rows_from_segments
from erniekit.ops.rope import rotate
from erniekit.rollout.decode import stream_ids
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.router import sparse_blocks
from erniekit.training.step import Totals

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TRANSFORMERS = ["dense/tied", "dense/untied_bias", "moe/shared_tied", "moe/noshared_untied"]
ERNIEKIT = ["dense_mha", "dense_tied", "moe_shared", "moe_mtp"]
PACKED = ["dense_mha", "dense_tied", "moe_shared"]  # the cases with a packed row
LOGITS, LOSS, GRADIENT = 2e-5, 1e-6, 1e-5


@pytest.fixture(autouse=True, params=["0", "1"], ids=["own", "numpy"])
def kernels(request, monkeypatch):
    """The CPU kernels that this machine has, then those in numpy."""
    monkeypatch.setenv("ERNIEKIT_NUMPY_OPS", request.param)


def batch_of(ids, labels, *, segments=None, positions=None):
    """A training batch; `labels` are the target of each position already."""
    shape = ids.shape
    count = np.broadcast_to(np.arange(shape[1]), shape).copy()
    return Batch(
        ids, labels, count if positions is None else positions, np.ones(shape, int) if segments is None else segments
    )


def backward(model, batch, weights=None):
    made = LanguageModelObjective(weights or LossWeights())(
        model, batch, Totals.of([batch], row_length=batch.labels.shape[1])
    )
    made.total.backward()
    return float(made.total)


def atom_gradients(model):
    """Gradients by atom name, [out, in]."""
    form = Form.usual(model.config, "ram", mtp_layers=model.config.num_nextn_predict_layers)
    table = layout_table(model.config, "ram", form)
    held = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    memory = Memory(table, held)
    return {
        atom: memory.read(atom).reshape(table.atoms[atom].shape)
        for atom, place in table.places.items()
        if place.tensor in held
    }


def compare(found, expected, name):
    assert np.abs(found - expected).max() <= GRADIENT * np.abs(expected).max(), name


def erniekit_gradients(stored, folder, prefix):
    """The stored gradients under `prefix` as atoms: a fused one is seen through the layout's own views."""
    tensors = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    for atom, place in folder.table.places.items():
        if place.tensor in tensors:
            yield atom, place.view(tensors[place.tensor]).reshape(folder.table.atoms[atom].shape)


# ---------------------------------------------------------------------- transformers
def in_both_layouts(cases):
    return pytest.mark.parametrize(
        ("case", "layout"), [(case, layout) for case in cases for layout in ("pt", "paddle")]
    )


of_transformers = in_both_layouts(TRANSFORMERS)
of_transformers_moe = in_both_layouts([case for case in TRANSFORMERS if case.startswith("moe")])


@functools.cache
def opened(case, layout):
    root = GOLDEN / case
    return load_model(root / layout), load_file(root / "inputs.safetensors"), load_file(root / "expected.safetensors")


@of_transformers
def test_logits(case, layout):
    model, given, expected = opened(case, layout)
    real = given["attention_mask"].astype(bool)
    found = model(paddle.to_tensor(given["input_ids"]), paddle.to_tensor(given["attention_mask"])).numpy()
    assert np.abs(found - expected["logits"])[real].max() <= LOGITS


@of_transformers
def test_packed_logits(case, layout):
    model, given, expected = opened(case, layout)
    segments = paddle.to_tensor((given["packed_position_ids"] == 0).cumsum(-1))
    found = model(paddle.to_tensor(given["input_ids"][:1]), segment_ids=segments).numpy()
    assert np.abs(found - expected["packed_logits"]).max() <= LOGITS


@of_transformers
def test_logits_at_other_positions(case, layout):
    model, given, expected = opened(case, layout)
    positions = paddle.arange(12).unsqueeze(0) * 3 + 1000
    found = model(paddle.to_tensor(given["input_ids"][:1]), position_ids=positions).numpy()
    # Angles of some thousand radians: fp32 rounding of the angle itself is 1.2e-4.
    assert np.abs(found - expected["pos_stride3_offset1000_logits"]).max() <= 2e-4


@of_transformers_moe
def test_routing(case, layout):
    model, given, expected = opened(case, layout)
    real = given["attention_mask"].reshape(-1).astype(bool)
    segments = paddle.to_tensor(given["attention_mask"])
    ids = paddle.to_tensor(given["input_ids"])
    trunk = model.trunk(ids, paddle.arange(12).unsqueeze(0).expand([2, 12]), end_rows_from_segments(segments))
    for i, routing in enumerate(trunk.routings):
        assert np.abs(routing.logits_ME.numpy() - expected[f"router_logits.{i}"])[real].max() <= LOGITS
        order, wanted = (
            np.argsort(x.numpy() if hasattr(x, "numpy") else x, -1)
            for x in (routing.experts_MK, expected[f"selected_experts.{i}"])
        )
        chosen = np.take_along_axis(routing.experts_MK.numpy(), order, -1)
        assert np.array_equal(chosen[real], np.take_along_axis(expected[f"selected_experts.{i}"], wanted, -1)[real])
        weights = np.take_along_axis(routing.weights_MK.numpy(), order, -1)
        assert np.abs(weights - np.take_along_axis(expected[f"routing_weights.{i}"], wanted, -1))[real].max() <= 1e-6


@of_transformers
def test_loss_and_every_gradient(case, layout):
    model, given, expected = opened(case, layout)
    model.clear_gradients()
    labels = np.full_like(given["labels"], -100)
    labels[:, :-1] = given["labels"][:, 1:]
    loss = backward(model, batch_of(given["input_ids"], labels, segments=given["attention_mask"]))
    assert loss == pytest.approx(float(expected["loss"][0]), rel=LOSS)
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for key, value in expected.items():
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.")
        if name in found:
            turn = value.ndim > 1 and "embed_tokens" not in name
            compare(found[name], value.swapaxes(-1, -2) if turn else value, name)
            compared += 1
        else:
            assert name.endswith("e_score_correction_bias") or name == "lm_head.weight", name
    assert compared == len(found)


@of_transformers_moe
def test_loss_with_the_pooled_router_loss_of_transformers(case, layout):
    model, given, expected = opened(case, layout)
    model.clear_gradients()
    labels = np.full_like(given["labels"], -100)
    labels[:, :-1] = given["labels"][:, 1:]
    batch = batch_of(given["input_ids"], labels, segments=given["attention_mask"])
    made = LanguageModelObjective(LossWeights())(model, batch, Totals.of([batch], row_length=12))
    pooled_logits = paddle.concat([routing.logits_ME for routing in made.routings])
    pooled_mask = paddle.concat([made.mask_M] * len(made.routings))
    pooled = balance_loss(pooled_logits, pooled_mask, experts_per_token=model.config.moe_k)
    assert float(pooled) == pytest.approx(float(expected["aux_loss_masked"][0]), rel=1e-5)
    total = made.total + 0.001 * pooled
    assert float(total) == pytest.approx(float(expected["loss_with_aux"][0]), rel=LOSS)
    total.backward()
    for name, p in model.named_parameters():
        if f"grad_with_aux.{name}" in expected:
            compare(p.grad.numpy(), expected[f"grad_with_aux.{name}"].T, name)


@of_transformers
def test_greedy_ids(case, layout):
    model, given, expected = opened(case, layout)
    prompt = given["input_ids"][0, :8].tolist()
    assert prompt + list(stream_ids(model, prompt, max_new_tokens=12)) == expected["generate_ids"][0].tolist()


# ---------------------------------------------------------------------- the real ERNIEKit
@pytest.fixture(scope="session")
def written_by_erniekit(tmp_path_factory):
    """(case, layout) -> (a fresh model on demand, its folder as ERNIEKit wrote it, stored inputs and outputs)."""
    converted = {}

    def open_case(case, layout):
        path = original = GOLDEN / "paddle_real" / case
        if layout == "pt":
            if case not in converted:
                converted[case] = tmp_path_factory.mktemp(case) / "pt"
                convert(original, converted[case], to="pt")
            path = converted[case]
        folder = Folder.open(path)
        return lambda: build_model(folder, folder.config), Folder.open(original), load_file(original / "io.safetensors")

    return open_case


def given_batch(stored, prefix="", *, with_positions=True):
    ids, labels, mask = (stored[f"{prefix}in.{name}"] for name in ("input_ids", "labels", "loss_mask"))
    length = 24
    labels = np.where(mask > 0, labels, -100)[:, :length]
    segments = positions = None
    if prefix:
        ends = stored["packed.in.attn_mask_start_row_indices"].reshape(1, -1)
        segments = 1 + np.concatenate([np.zeros((1, 1), int), (np.diff(ends) != 0).cumsum(-1)], 1)
        positions = stored["packed.in.position_ids"] if with_positions else None
    return batch_of(ids[:, :length], labels, segments=segments, positions=positions)


def router_weights(model):
    extras = model.config.extras
    return LossWeights(
        balance=extras["moe_aux_loss_lambda"], z=extras["moe_z_loss_lambda"],
        orthogonal=extras["moe_orthogonal_loss_lambda"], multi_token=extras["multi_token_pred_lambda"],
    )  # fmt: skip


@in_both_layouts(ERNIEKIT)
def test_erniekit_logits(written_by_erniekit, case, layout):
    make, _, stored = written_by_erniekit(case, layout)
    found = make()(paddle.to_tensor(given_batch(stored).input_ids)).numpy()
    assert np.abs(found - stored["a.logits"]).max() <= LOGITS


@in_both_layouts(ERNIEKIT)
def test_erniekit_loss_and_every_gradient(written_by_erniekit, case, layout):
    make, folder, stored = written_by_erniekit(case, layout)
    model = make()
    loss = backward(model, given_batch(stored), router_weights(model))
    assert loss == pytest.approx(float(stored["a.loss"][0]), rel=LOSS)
    found = atom_gradients(model)
    names = [
        atom
        for atom, value in erniekit_gradients(stored, folder, "a.grad.")
        if compare(found[atom], value, atom) is None
    ]
    assert len(names) >= 7


@in_both_layouts(PACKED)
def test_erniekit_packed_rows(written_by_erniekit, case, layout):
    make, _, stored = written_by_erniekit(case, layout)
    batch, model = given_batch(stored, "packed.", with_positions=False), make()
    segments, positions = paddle.to_tensor(batch.segment_ids), paddle.to_tensor(batch.position_ids)
    found = model(paddle.to_tensor(batch.input_ids), position_ids=positions, segment_ids=segments).numpy()
    real = stored["packed.in.attn_mask_start_row_indices"].reshape(1, -1) > np.arange(24)  # the rest is padding
    assert real.sum() == 19
    assert np.abs(found - stored["packed_nopos.logits"])[real].max() <= LOGITS
    for run, with_positions in (("packed_nopos", False), ("packed_pos", True)):
        loss = backward(make(), given_batch(stored, "packed.", with_positions=with_positions))
        assert loss == pytest.approx(float(stored[f"{run}.loss"][0]), rel=LOSS)


@in_both_layouts(PACKED)
def test_erniekit_packed_gradients(written_by_erniekit, case, layout, monkeypatch):
    """The same row with ERNIEKit's treatment of padding put in place of ours: there a padding column is masked even for
    itself, by adding -1e6 in fp32, so a padding row attends to all columns; and padding counts in the router losses."""
    make, folder, stored = written_by_erniekit(case, layout)
    ends = stored["packed.in.attn_mask_start_row_indices"].reshape(1, -1)
    row = np.arange(24)[:, None]
    added = paddle.to_tensor(np.where((row >= row.T) & (row < ends), 0.0, -1e6).astype("float32"))

    def attention(q, k, v, *, cos_BSJ, sin_BSJ, end_rows_BS, head_dim):
        split = [t.reshape([1, 24, -1, head_dim]) for t in (q, k, v)]
        q, k = (rotate(t, cos_BSJ, sin_BSJ).transpose([0, 2, 1, 3]) for t in split[:2])
        v, share = split[2].transpose([0, 2, 1, 3]), q.shape[1] // k.shape[1]
        k, v = (paddle.repeat_interleave(t, share, axis=1) for t in (k, v))
        weights = paddle.nn.functional.softmax(paddle.matmul(q, k, transpose_y=True) * head_dim**-0.5 + added)
        return paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([1, 24, -1])

    monkeypatch.setattr("erniekit.models.attention.attention", attention)
    model = make()
    batch = given_batch(stored, "packed.", with_positions=False)
    found = model(paddle.to_tensor(batch.input_ids), position_ids=paddle.to_tensor(batch.position_ids)).numpy()
    assert np.abs(found - stored["packed_nopos.logits"]).max() <= LOGITS
    backward(model, batch, router_weights(model))
    gradients = atom_gradients(model)
    compared = 0
    for atom, value in erniekit_gradients(stored, folder, "packed_nopos.grad."):
        compare(gradients[atom], value, atom)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("term", ["aux_only", "z_only", "ortho_only", "nolb"])
@in_both_layouts(["moe_shared"])
def test_erniekit_router_losses_and_their_gradients(written_by_erniekit, case, layout, term):
    make, folder, stored = written_by_erniekit(case, layout)
    model = make()
    coefficients = {
        "aux_only": dict(balance=1.0),
        "z_only": dict(z=1.0),
        "ortho_only": dict(orthogonal=1.0),
        "nolb": {},
    }
    batch = given_batch(stored)
    made = LanguageModelObjective(LossWeights(**coefficients[term]))(model, batch, Totals.of([batch], row_length=24))
    made.total.backward()
    k = model.config.moe_k
    values = {
        "aux_only": lambda i: balance_loss(made.routings[i].logits_ME, made.mask_M, experts_per_token=k),
        "z_only": lambda i: z_loss(made.routings[i].logits_ME, made.mask_M),
        "ortho_only": lambda i: orthogonal_loss(sparse_blocks(model)[i].gate.weight),
        "nolb": lambda _: paddle.zeros([]),
    }
    for i, expected in enumerate(stored[f"{term}.router_loss_per_layer"]):
        assert float(values[term](i)) == pytest.approx(float(expected), rel=1e-5)
    assert float(made.total) == pytest.approx(float(stored["a.loss"][0]), rel=LOSS)  # reported without them
    found = atom_gradients(model)
    compared = [
        atom
        for atom, value in erniekit_gradients(stored, folder, f"{term}.grad.")
        if compare(found[atom], value, atom) is None
    ]
    assert compared


@pytest.mark.parametrize("case", ["dense_tied_bf16_u16", "moe_shared_bf16_sharded"])
def test_bf16_files_of_erniekit_hold_the_rounded_fp32_weights(case):
    """Both taggings of bfloat16 load, and give the logits of the fp32 model rounded to bf16."""
    twin = {"dense_tied_bf16_u16": "dense_tied", "moe_shared_bf16_sharded": "moe_shared"}[case]
    model, exact = (load_model(GOLDEN / "paddle_real" / name) for name in (case, twin))
    same = {name: p.numpy() for name, p in exact.named_parameters()}
    for name, p in model.named_parameters():
        wanted = (
            same[name]
            if "gate.weight" in name or "e_score" in name
            else paddle.to_tensor(same[name]).astype("bfloat16").astype("float32").numpy()
        )
        assert np.array_equal(p.numpy(), wanted), name


def test_the_golden_cases_are_all_here():
    assert json.loads((GOLDEN / "moe/shared_tied/meta.json").read_text())["loss"] == pytest.approx(5.691405, abs=1e-5)
