"""Usage counting, the correction bias and the decoupled orthogonal step on a small model."""

import numpy as np
import paddle
import pytest

from erniekit.config.architecture import ErnieConfig
from erniekit.losses.router import orthogonal_gradient, orthogonal_loss
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.moe import Routing
from erniekit.training.router import RouterUpkeep, sparse_blocks


@pytest.fixture
def model():
    cfg = ErnieConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2,
        moe_intermediate_size=8, moe_layer_start_index=1, moe_layer_end_index=2,
    )  # fmt: skip
    made = ErnieForCausalLM(cfg)
    paddle.seed(0)
    for p in made.parameters():
        if not p.stop_gradient:
            p.set_value(paddle.randn(p.shape) * 0.3)
    return made


def routing(choices):
    experts = paddle.to_tensor(choices)
    return Routing(paddle.zeros([len(choices), 4]), experts, paddle.ones(experts.shape) / 2)


def test_bias_moves_against_usage_and_padding_is_not_counted(model):
    upkeep = RouterUpkeep(model, bias_coefficient=0.25, orthogonal_lambda=0.0)
    mask = paddle.to_tensor([True, True, True, False])
    first, second = routing([[0, 1], [0, 1], [0, 2], [3, 3]]), routing([[3, 2], [3, 2], [3, 1], [0, 0]])
    upkeep.count([first, second], mask)
    figures = upkeep.after_optimizer()
    biases = [block.moe_statics.e_score_correction_bias.numpy()[0].tolist() for block in sparse_blocks(model)]
    assert biases == [[-0.25, -0.25, 0.25, 0.25], [0.25, 0.25, -0.25, -0.25]]
    assert figures == {"expert_load_max": 2.0}


def test_micro_batches_add_up_and_a_step_forgets(model):
    upkeep = RouterUpkeep(model, bias_coefficient=0.5, orthogonal_lambda=0.0)
    mask = paddle.to_tensor([True])
    for choice in ([0, 1], [2, 3]):
        upkeep.count([routing([choice])] * 2, mask)
    assert upkeep.after_optimizer() == {"expert_load_max": 1.0}  # even over both micro-batches
    assert np.all(sparse_blocks(model)[0].moe_statics.e_score_correction_bias.numpy() == 0)
    assert upkeep.after_optimizer() == {}


def test_decoupled_orthogonal_step_has_no_learning_rate_and_lowers_the_loss(model):
    upkeep = RouterUpkeep(model, bias_coefficient=0.0, orthogonal_lambda=0.05)
    before = [block.gate.weight.clone() for block in sparse_blocks(model)]
    upkeep.count([routing([[0, 1]])] * 2, paddle.to_tensor([True]))
    upkeep.after_optimizer()
    for block, old in zip(sparse_blocks(model), before, strict=True):
        assert np.array_equal(block.gate.weight.numpy(), (old - 0.05 * orthogonal_gradient(old)).numpy())
        assert float(orthogonal_loss(block.gate.weight)) < float(orthogonal_loss(old))
