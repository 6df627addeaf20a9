"""A whole tiny model on the fast kernels: against the plain twins, with recomputation, under no_grad, in a fork."""

from __future__ import annotations

import multiprocessing

import numpy as np
import paddle
import pytest
from paddle.base import core

from erniekit.config.architecture import ErnieConfig
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.attention import end_rows_from_segments
from erniekit.ops.cross_entropy import IGNORED
from erniekit.parallel.recompute import apply_recompute
from tests.unit.ops.twins import assert_close, assert_same_bits, drawn

ROWS, LENGTH, VOCAB = 2, 70, 101


def tiny() -> ErnieForCausalLM:
    config = ErnieConfig.from_dict(
        {
            "model_type": "ernie4_5_moe", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 36,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-3, "rope_theta": 10000.0, "use_bias": True,
            "tie_word_embeddings": True, "hidden_act": "silu", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 10, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1,
        }
    )  # fmt: skip
    model = ErnieForCausalLM(config)
    for seed, p in enumerate(model.parameters()):
        p.set_value(0.2 * drawn(*p.shape, seed=seed) + (len(p.shape) == 1))
    return model


def loss_and_gradients(model: ErnieForCausalLM) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(5)
    segments = np.zeros([ROWS, LENGTH], "int64")
    segments[:, :20], segments[:, 20:60] = 1, 2
    labels = rng.integers(0, VOCAB, [ROWS, LENGTH])
    labels[rng.random([ROWS, LENGTH]) < 0.5] = IGNORED
    positions = np.concatenate([np.arange(20), np.arange(LENGTH - 20)])[None].repeat(ROWS, 0)
    trunk = model.trunk(
        paddle.to_tensor(rng.integers(0, VOCAB, [ROWS, LENGTH])), paddle.to_tensor(positions),
        end_rows_from_segments(paddle.to_tensor(segments)),
    )  # fmt: skip
    loss = model.lm_head.loss_sum(trunk.hidden_BSD.reshape([-1, 24]), paddle.to_tensor(labels).reshape([-1]))
    (loss / 70.0).backward()
    found = {name: None if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return found | {"loss": loss.numpy()}


def test_loss_and_gradients_equal_the_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    found = loss_and_gradients(model)
    assert sum(grad is not None for grad in found.values()) > 30
    assert_same_bits(loss_and_gradients(model), found)
    monkeypatch.setenv("ERNIEKIT_PLAIN_OPS", "1")
    assert_close(found, loss_and_gradients(model))


def test_recomputation_changes_no_bit_and_frees_what_was_saved() -> None:
    model = tiny()
    found = loss_and_gradients(model)
    one_input = 8 * 128 * 24 * 4
    assert held_after_forward(model) > 40 * one_input
    apply_recompute(model, "full")
    assert_same_bits(loss_and_gradients(model), found)
    assert held_after_forward(model) < 8 * one_input  # of three layers and the last norm, and what that makes


def held_after_forward(model: ErnieForCausalLM) -> int:
    """Bytes that a forward pass keeps for backward."""
    ids = paddle.ones([8, 128], "int64")
    positions, ends = paddle.arange(128).unsqueeze(0).expand([8, 128]), paddle.full([8, 128], 128, "int32")
    before = core.host_memory_stat_current_value("Allocated", 0)
    trunk = model.trunk(ids, positions, ends)
    held = core.host_memory_stat_current_value("Allocated", 0) - before
    assert trunk.hidden_BSD is not None
    return held


def test_no_grad_gives_the_same_logits_and_no_graph() -> None:
    model, ids = tiny(), paddle.arange(30).reshape([2, 15])
    with_graph = model(ids)
    with paddle.no_grad():
        without = model(ids)
    assert without.stop_gradient and not with_graph.stop_gradient
    assert without.numpy().tobytes() == with_graph.numpy().tobytes()


def test_a_forked_child_computes_the_same() -> None:
    model = tiny()
    found = loss_and_gradients(model)  # the parent's threads exist before the fork
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert_same_bits(pool.apply(_in_child, [found["loss"]]), {"loss": found["loss"]})


def _in_child(_: np.ndarray) -> dict[str, np.ndarray | None]:
    return {"loss": loss_and_gradients(tiny())["loss"]}
