"""Recomputation over frozen weights: the adapter of the first layer is trained, and nothing is said about it."""

import numpy as np

from erniekit.adapters.lora import add_adapters
from erniekit.config.adapter import AdapterConfig
from erniekit.parallel.recompute import apply_recompute
from tests.unit.training.micro import gradients_of, make_model

FIRST = "model.layers.0.self_attn.q_proj"


def adapted():
    model = make_model()
    add_adapters(model, AdapterConfig(rank=2, alpha=4, init="pissa", targets=(FIRST,)), seed=0)
    return model


def test_the_first_layer_of_a_frozen_model(caplog):
    plain, recomputed = adapted(), adapted()
    apply_recompute(recomputed, "full")
    wanted, found = gradients_of(plain), gradients_of(recomputed)
    assert found.keys() == wanted.keys() == {f"{FIRST}.adapter.lora_A", f"{FIRST}.adapter.lora_B"}
    for name, gradient in wanted.items():
        assert np.array_equal(found[name], gradient) and gradient.any()
    assert caplog.messages == []
