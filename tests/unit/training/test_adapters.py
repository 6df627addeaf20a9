"""How a run moves adapters: what is frozen among them, how fast they go, and that the base stands still."""

import numpy as np
import paddle
import pytest

from erniekit.adapters.lora import add_adapters
from erniekit.adapters.targets import adapter_config
from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config
from erniekit.training.assemble import assemble_optimizer, router_upkeep
from erniekit.training.selection import freeze
from tests.unit.training.micro import make_model, one_step, weights_of


def adapted(**values):
    """(a model with the adapters that the keys ask for, the config)."""
    cfg, model = load_config({"fine_tuning": "LoRA", "lora_rank": 2, **values}), make_model()
    add_adapters(model, adapter_config(cfg.lora, [name for name, _ in model.named_parameters()]), seed=0)
    freeze(model, cfg.optimizer)
    return model, cfg


def trained(model):
    return {name for name, p in model.named_parameters() if not p.stop_gradient}


def test_a_step_moves_adapters_only_and_their_states_alone_exist():
    model, cfg = adapted(weight_decay=0.5, modules_to_save=["model.norm"])
    before, optimizer = weights_of(model), assemble_optimizer(model, cfg)
    one_step(model, optimizer, rate=1e-2)
    one_step(model, optimizer, rate=1e-2)  # B has left zero, so A moves by more than decay
    moved = {name for name, value in weights_of(model).items() if not np.array_equal(value, before[name])}
    assert moved == trained(model) == set(optimizer.parameters)
    assert {key.rpartition(".")[0] for key in optimizer.state()} == moved


def test_patterns_pick_among_what_adapters_train():
    model, _ = adapted(freeze=[r"layers\.0\."], train_only=["q_proj", "experts"])
    assert trained(model) and all("layers.1." in n and ("q_proj" in n or "experts" in n) for n in trained(model))
    with pytest.raises(ConfigError, match="freeze: 'embed_tokens' matches no parameter"):
        adapted(freeze=["embed_tokens"])  # of the base, which is frozen anyway
    model, cfg = adapted(lr_multipliers={"input_layernorm": 2.0})
    with pytest.raises(ConfigError, match="lr_multipliers: 'input_layernorm' matches no parameter"):
        assemble_optimizer(model, cfg)


@pytest.mark.parametrize(("given", "ratio"), [({"lora_plus_scale": 8}, 8.0), ({"rslora_plus": True}, 4.0), ({}, 1.0)])
def test_b_moves_faster_by_exactly_the_ratio_in_the_first_step(given, ratio):
    def moved(**values):
        model, cfg = adapted(adam_epsilon=1e-30, lora_alpha=4, rslora=True, **values)
        before = weights_of(model)
        one_step(model, assemble_optimizer(model, cfg), rate=1e-2)
        after = weights_of(model)
        return {name: after[name] - before[name] for name in trained(model)}

    plain, scaled = moved(), moved(**given)
    assert any(value.any() for name, value in plain.items() if name.endswith("lora_B"))
    for name, value in plain.items():
        factor = ratio if name.endswith("lora_B") else 1.0
        np.testing.assert_allclose(scaled[name], factor * value, rtol=1e-4, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("saved", [None, ["mlp.gate"]])
def test_the_correction_bias_stands_still_beside_adapters(saved):
    """With the routers trained whole too: an adapter folder has no place for it."""
    model, cfg = adapted(moe_use_aux_free=True, modules_to_save=saved)
    upkeep, block = router_upkeep(model, cfg), model.model.layers[1].mlp
    upkeep._usage = [paddle.to_tensor([4.0, 0.0, 0.0, 0.0])]
    upkeep.after_optimizer()
    assert not block.moe_statics.e_score_correction_bias.numpy().any()


def test_a_rate_for_frozen_routers_is_told_to_be_without_effect(capsys):
    model, cfg = adapted(moe_gate_lr_ratio=0.1)
    assemble_optimizer(model, cfg)
    assert "moe_gate_lr_ratio has no effect: the routers are frozen" in capsys.readouterr().err
    model, cfg = adapted(moe_gate_lr_ratio=0.1, modules_to_save=["mlp.gate"])
    assemble_optimizer(model, cfg)
    assert "no effect" not in capsys.readouterr().err
