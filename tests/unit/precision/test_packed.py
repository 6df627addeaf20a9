"""Packed weights in the slots of a model: forward, gradients of what is below, recomputation, rounded products, and
adapters on top."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.adapters.lora import add_adapters
from erniekit.config.adapter import AdapterConfig
from erniekit.config.packing import Packing
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.layers import Linear
from erniekit.models.moe import Experts
from erniekit.ops.wheel import has_bf16_products
from erniekit.parallel.recompute import apply_recompute
from erniekit.precision.packed import PackedLinear, packed_weights, store_for, use_packed_weights
from erniekit.precision.products import use_bf16_products
from tests.unit.precision.test_products import tiny

PACKINGS = [Packing("wint8"), Packing("wint4/8"), Packing("wint4", 8), Packing("nf4", 16)]
IDS = np.random.default_rng(5).integers(0, 101, [2, 24])


def packed_and_dense(packing: Packing) -> tuple[ErnieForCausalLM, ErnieForCausalLM]:
    """A tiny model with packed weights, and one whose ordinary weights are what these stand for."""
    packed, dense = tiny(), tiny()
    weights = {name: p.numpy() for name, p in packed.named_parameters()}
    use_packed_weights(packed, packing, dtype="float32")
    parameters = dict(dense.named_parameters())
    for name, layer in packed_weights(packed).items():
        stack = weights[name].reshape(layer.store.shape)
        for index, weight in enumerate(stack):
            layer.store.put(index, weight, name=name)
        made = np.stack([layer.store.dense(i).numpy() for i in range(len(stack))])
        parameters[name].set_value(made.reshape(layer.shape))
    return packed, dense


def run(model: ErnieForCausalLM) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradients of what wants one."""
    logits = model(paddle.to_tensor(IDS))
    (logits * paddle.to_tensor(np.random.default_rng(1).normal(size=logits.shape).astype("float32"))).sum().backward()
    return logits.numpy(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.compute_type)
def test_a_packed_model_is_the_model_of_its_dense_weights(packing):
    packed, dense = packed_and_dense(packing)
    (found, gradients), (want, expected) = run(packed), run(dense)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    high = {name for name, p in packed.named_parameters() if not p.stop_gradient}
    assert gradients.keys() == high and "model.embed_tokens.weight" in high
    assert not any("proj.weight" in name for name in high)
    for name in high:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradients[name], expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)
    again, same = run(packed_and_dense(packing)[0])
    assert again.tobytes() == found.tobytes()
    assert all(same[name].tobytes() == gradients[name].tobytes() for name in high)


def test_recomputation_changes_nothing():
    plain, again = (packed_and_dense(Packing("wint4/8"))[0] for _ in range(2))
    apply_recompute(again, "full")
    (_, expected), (_, found) = run(plain), run(again)
    assert expected.keys() == found.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)


def test_adapters_alone_are_trained_and_start_from_the_packed_model():
    packed, _ = packed_and_dense(Packing("wint4/8"))
    before = packed(paddle.to_tensor(IDS)).numpy()
    linears = [name for name, layer in packed.named_sublayers() if isinstance(layer, Linear)]
    stacks = [name for name, layer in packed.named_sublayers() if isinstance(layer, Experts)]
    targets = (*linears, *(f"{name}.{part}" for name in stacks for part in ("gate_up_proj", "down_proj")))
    add_adapters(packed, AdapterConfig(rank=2, alpha=4, targets=targets), seed=0)
    logits, gradients = run(packed)
    np.testing.assert_array_equal(logits, before)  # B starts at zero
    assert gradients.keys() == {name for name, _ in packed.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_pissa_starts_from_the_weights_that_packed_experts_stand_for(part):
    models = packed_and_dense(Packing("wint4/8"))
    target = f"model.layers.1.mlp.experts.{part}"
    for model in models:
        add_adapters(model, AdapterConfig(rank=2, alpha=2, init="pissa", targets=(target,)), seed=0)
    found, want = (
        next(p.numpy() for name, p in model.named_parameters() if name.endswith("_adapter.lora_A")) for model in models
    )
    np.testing.assert_array_equal(found, want)


def test_rounded_products_reach_packed_weights():
    if not has_bf16_products():
        pytest.skip("needs avx512_bf16 or amx_bf16")
    exact, rounded = (packed_and_dense(Packing("wint8"))[0] for _ in range(2))
    use_bf16_products(rounded)
    want, found = run(exact)[0], run(rounded)[0]
    assert want.tobytes() != found.tobytes()
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-2 * np.abs(want).max())


def test_rows_of_any_shape_go_through_a_linear_layer():
    layer = PackedLinear(store_for("int4", (1, 6, 4), group_size=3, dtype="float32"))
    layer.store.put(0, np.random.default_rng(0).normal(size=(6, 4)).astype("float32"), name="w")
    for shape in ([6], [1, 6], [2, 3, 6], [0, 6], [2, 0, 6]):
        x = paddle.to_tensor(np.random.default_rng(1).normal(size=shape).astype("float32"))
        found = layer(x)
        assert found.shape == [*shape[:-1], 4]
        np.testing.assert_allclose(found.numpy(), x.numpy() @ layer.dense().numpy(), rtol=0, atol=1e-6)
