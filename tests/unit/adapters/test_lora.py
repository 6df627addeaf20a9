"""Adapters on a small mixture of experts: what is trained, where it starts, and what it does to the mathematics."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.adapters.layers import DoraAdapter
from erniekit.adapters.lora import adapter_parameters, adapters_off, add_adapters
from erniekit.adapters.targets import adapter_names, resolve_saved, resolve_targets, slot
from erniekit.base.errors import ConfigError
from erniekit.config.adapter import AdapterConfig
from erniekit.parallel.recompute import GRANULARITIES, apply_recompute
from tests.unit.adapters.golden import names_of
from tests.unit.training.micro import backward, gradients_of, make_batch, make_model

RANK, SCALING = 3, 2.0


def adapted(*, targets=None, saved=(), seed=0, filled=True, **facts):
    """A model with adapters whose B is not zero (where `filled`)."""
    model = make_model()
    config = AdapterConfig(
        rank=RANK, alpha=SCALING * RANK, targets=resolve_targets(names_of(model), targets),
        modules_to_save=resolve_saved(names_of(model), saved), **facts,
    )  # fmt: skip
    add_adapters(model, config, seed=seed)
    rng = np.random.default_rng(5)
    for name, p in adapter_parameters(model).items():
        if filled and not p.stop_gradient and not name.endswith("lora_A"):
            p.set_value(p.numpy() + rng.normal(0, 0.2, p.shape).astype("float32"))
    return model, config


def hidden(model):
    """What the model computes for the batch."""
    batch = make_batch()
    return model(paddle.to_tensor(batch.input_ids), segment_ids=paddle.to_tensor(batch.segment_ids)).numpy()


def merged(model, config):
    """The base with the adapters in its weights."""
    whole = make_model()
    parameters, modules = dict(whole.named_parameters()), dict(model.named_sublayers())
    for target in config.targets:
        a, b = modules[slot(target)].factors()
        p = parameters[target if target in parameters else f"{target}.weight"]
        p.set_value(p + config.scaling * paddle.matmul(a, b))
    return whole


@pytest.mark.parametrize("facts", [{}, {"dora": True, "targets": ["attention", "mlp"]}, {"init": "pissa"}])
def test_only_adapters_and_whole_modules_are_trained(facts):
    model, config = adapted(saved=["lm_head", "mlp.gate"], **facts)
    base = names_of(make_model())
    trained = [name for name, p in model.named_parameters() if not p.stop_gradient]
    assert set(trained) == set(adapter_names(config, base))
    assert {"lm_head.weight", "model.layers.1.mlp.gate.weight"} < set(trained)
    assert [name for name in names_of(model) if name in base] == base
    assert set(gradients_of(model)) == set(trained)


def test_the_number_of_trained_parameters():
    model, _ = adapted()
    d, x, y, dense, experts, width = 16, 16, 8, 32, 4, 8
    attention = (d + x) + 2 * (d + y) + (x + d)
    mlp = 2 * (d + dense) + (dense + d)
    routed = experts * ((d + 2 * width) + (width + d))
    trained = sum(p.size for p in model.parameters() if not p.stop_gradient)
    assert trained == RANK * (2 * attention + mlp + routed)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_by_name():
    model, _ = adapted(filled=False)
    assert np.array_equal(hidden(model), hidden(make_model()))
    few, _ = adapted(filled=False, targets=["q_proj"])
    other, _ = adapted(filled=False, seed=1)
    name = "model.layers.0.self_attn.q_proj.adapter.lora_A"
    drawn = [dict(m.named_parameters())[name].numpy() for m in (model, few, other)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    below = dict(model.named_parameters())[name.replace("layers.0", "layers.1")].numpy()
    assert not np.array_equal(drawn[0], below)
    stacked = dict(model.named_parameters())["model.layers.1.mlp.experts.gate_up_adapter.lora_A"].numpy()
    for values, num_in in ((drawn[0], 16), (stacked, 16)):
        bound = 1 / np.sqrt(num_in)
        assert 0.8 * bound < np.abs(values).max() <= bound and abs(values.mean()) < 0.2 * bound


@pytest.mark.parametrize("facts", [{}, {"init": "pissa"}, {"rslora": True}])
def test_the_model_is_the_base_with_merged_weights(facts):
    model, config = adapted(**facts)
    found, expected = hidden(model), hidden(merged(model, config))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(found - hidden(make_model())).max() > 1e-2


def test_gradients_follow_from_those_of_the_merged_weights():
    """W' = W + s A B, so dA = s dW' B^T and dB = s A^T dW'; routed experts too."""
    model, config = adapted()
    whole = merged(model, config)
    found, expected = gradients_of(model), gradients_of(whole)
    for target in config.targets:
        full = expected[target if target in expected else f"{target}.weight"]
        adapter = dict(model.named_sublayers())[slot(target)]
        a, b = adapter.lora_A.numpy(), adapter.lora_B.numpy()
        for part, want in (("A", full @ b.swapaxes(-1, -2)), ("B", a.swapaxes(-1, -2) @ full)):
            got = found[f"{slot(target)}.lora_{part}"]
            assert np.abs(got - SCALING * want).max() <= 2e-5 * np.abs(SCALING * want).max(), (target, part)


@pytest.mark.parametrize("facts", [{}, {"dora": True, "targets": ["attention", "mlp"]}, {"init": "pissa"}])
def test_without_adapters_the_model_is_its_base_bit_for_bit(facts):
    model, _ = adapted(saved=["embed_tokens", "model.norm"], **facts)
    before = hidden(model)
    with adapters_off(model):
        assert np.array_equal(hidden(model), hidden(make_model()))
        assert not [name for name in names_of(model) if "lora_" in name]
    assert np.array_equal(hidden(model), before)
    assert not np.array_equal(before, hidden(make_model()))


def test_the_adapter_is_back_after_an_error():
    model, _ = adapted()
    before = hidden(model)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert np.array_equal(hidden(model), before)


def test_dora_is_direction_times_length():
    model, config = adapted(dora=True, targets=["attention", "mlp"])
    whole = merged(model, config)
    parameters = dict(whole.named_parameters())
    for target in config.targets:
        p, magnitude = parameters[f"{target}.weight"], dict(model.named_sublayers())[slot(target)].magnitude
        p.set_value(magnitude * p / p.norm(axis=0))
    expected = hidden(whole)
    assert np.abs(hidden(model) - expected).max() <= 1e-5 * np.abs(expected).max()
    fresh, _ = adapted(dora=True, targets=["attention", "mlp"], filled=False)
    assert np.abs(hidden(fresh) - hidden(make_model())).max() <= 1e-5 * np.abs(expected).max()


def test_gradients_of_dora_take_the_length_for_a_constant():
    model, _ = adapted(dora=True, targets=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    adapter = layer.adapter
    assert isinstance(adapter, DoraAdapter)
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(5, 16)).astype("float32"))
    (layer(x) ** 2).sum().backward()
    trained = (adapter.lora_A, adapter.lora_B, adapter.magnitude)
    found = [p.grad.numpy() for p in trained]
    copies = [paddle.to_tensor(p.numpy(), stop_gradient=False) for p in trained]
    a, b, magnitude = copies
    weight = layer.weight + SCALING * paddle.matmul(a, b)
    (paddle.matmul(x, magnitude * weight / weight.norm(axis=0).detach()) ** 2).sum().backward()
    for got, want in zip(found, (p.grad.numpy() for p in copies), strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_pissa_starts_as_the_base_on_its_largest_singular_vectors():
    model, config = adapted(init="pissa", filled=False)
    expected = hidden(make_model())
    assert np.abs(hidden(model) - expected).max() <= 1e-5 * np.abs(expected).max()
    base = dict(make_model().named_parameters())
    for target in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.down_proj"):
        weight = base[target if target in base else f"{target}.weight"].numpy()
        adapter = dict(model.named_sublayers())[slot(target)]
        best = config.scaling * adapter.lora_A.numpy() @ adapter.lora_B.numpy()
        left = np.linalg.svd(weight - best, compute_uv=False)
        np.testing.assert_allclose(left[..., :-RANK], np.linalg.svd(weight, compute_uv=False)[..., RANK:], atol=1e-5)
        assert np.array_equal(adapter.initial_A.numpy(), adapter.lora_A.numpy())


def test_pissa_needs_as_many_singular_vectors_as_its_rank():
    model, facts = make_model(), {"init": "pissa", "targets": ("model.layers.0.self_attn.k_proj",)}
    with pytest.raises(ConfigError, match=r"lora_rank: 9 and .* has 8 singular vectors"):
        add_adapters(model, AdapterConfig(9, 18, **facts), seed=0)


def test_dropout_is_of_training_only_and_drawn_from_the_seed():
    model, _ = adapted(dropout=0.5)
    model.eval()
    plain, _ = adapted()
    assert np.array_equal(hidden(model), hidden(plain))
    model.train()
    runs = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        runs.append(hidden(model))
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
    with adapters_off(model):
        assert np.array_equal(hidden(model), hidden(make_model()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("facts", [{"dropout": 0.3}, {"dora": True, "targets": ["attention"]}])
def test_recomputation_changes_no_gradient_bit(granularity, facts):
    gradients = []
    for recompute in (False, True):
        model, _ = adapted(**facts)
        if recompute:
            apply_recompute(model, granularity)
        model.train()
        paddle.seed(7)
        gradients.append(gradients_of(model))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(np.array_equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_gradients_of_the_base_are_never_made(monkeypatch):
    """Every kernel that makes gradients of weights is shown that nobody wants them."""
    from erniekit.ops import cpu

    asked = []
    for module in (cpu.dense, cpu.experts, cpu.cross_entropy):
        def spy(name, *arguments, real=module.call):
            asked.append((name, arguments))
            return real(name, *arguments)

        monkeypatch.setattr(module, "call", spy)
    model, _ = adapted()
    backward(model)
    weights = {"linear_backward": 4, "grouped_linear_backward": 5, "rms_norm_backward": 5}
    seen = {name: [arguments[at] for kernel, arguments in asked if kernel == name] for name, at in weights.items()}
    assert all(found and not any(gradient is not None for gradient in found) for found in seen.values()), seen
    assert [arguments[-8] for kernel, arguments in asked if kernel == "cross_entropy"] == [None]
