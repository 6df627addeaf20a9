"""Adapters beside what PEFT and ERNIEKit compute with the same numbers (tests/data/golden/README.md)."""

from __future__ import annotations

import numpy as np
import pytest

from erniekit.data.batch import Batch
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.step import Totals
from tests.unit.adapters.golden import GOLDEN, logits, of_erniekit, of_peft


def loss_of(model, ids, labels, weights=None):
    """Of targets that stand at their position already; leaves the gradients on the parameters."""
    shape = ids.shape
    batch = Batch(ids, labels, np.broadcast_to(np.arange(shape[1]), shape).copy(), np.ones(shape, int))
    made = LanguageModelObjective(weights or LossWeights())(model, batch, Totals.of([batch], row_length=shape[1]))
    made.total.backward()
    return float(made.total)


@pytest.mark.parametrize("case", ["lora_r4_a8", "rslora_r4_a8", "lora_r4_a8_all_linear"])
def test_peft(case):
    model, given, facts = of_peft(case)
    real = given["attention_mask"].astype(bool)
    found = logits(model, given["input_ids"], given["attention_mask"])
    assert np.abs(found - given["logits"])[real].max() <= 1e-5
    labels = np.full_like(given["labels"], -100)
    labels[:, :-1] = given["labels"][:, 1:]
    chosen = np.take_along_axis(found, np.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = np.log(np.exp(found.astype("float64")).sum(-1)) - chosen
    assert losses[labels != -100].mean() == pytest.approx(facts["loss"], rel=1e-5)


def test_erniekit_logits_loss_and_gradients():
    model, stored = of_erniekit()
    assert np.abs(logits(model, stored["in.input_ids"]) - stored["logits"]).max() <= 2e-5
    extras = model.config.extras
    weights = LossWeights(
        balance=extras["moe_aux_loss_lambda"], z=extras["moe_z_loss_lambda"],
        orthogonal=extras["moe_orthogonal_loss_lambda"],
    )  # fmt: skip
    labels = np.where(stored["in.loss_mask"] > 0, stored["in.labels"], -100)
    assert loss_of(model, stored["in.input_ids"], labels, weights) == pytest.approx(float(stored["loss"][0]), rel=1e-6)
    attention = model.model.layers[1].self_attn
    ours = [getattr(attention, f"{part}_proj").adapter for part in "qkv"]
    name = "grad.model.ernie.layers.1.self_attn.qkv_proj.lora_"
    found_a = sum(adapter.lora_A.grad.numpy() for adapter in ours)  # theirs is one A for all three
    found_b = np.concatenate([adapter.lora_B.grad.numpy() for adapter in ours], axis=1)
    for found, want in ((found_a, stored[f"{name}A"]), (found_b, stored[f"{name}B"])):
        assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


def test_the_cases_are_all_here():
    assert {path.name for path in (GOLDEN / "dpo").iterdir()} >= {"lora.json", "lora.safetensors"}
