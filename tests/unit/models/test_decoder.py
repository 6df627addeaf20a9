"""Properties of the model that no golden shows: packing, masks, recomputation, caches, multi-token prediction."""

import numpy as np
import paddle
import pytest

from erniekit.config.architecture import ErnieConfig
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.attention import end_rows_from_mask, end_rows_from_segments
from erniekit.parallel.recompute import GRANULARITIES, apply_recompute
from erniekit.rollout.decode import stream_ids as stream


def build(**changes):
    cfg = ErnieConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2,
        moe_intermediate_size=16, moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=2,
    ).replace(**changes)  # fmt: skip
    model = ErnieForCausalLM(cfg)
    paddle.seed(0)
    for name, p in model.named_parameters():
        p.set_value(paddle.ones(p.shape) if "norm" in name else paddle.randn(p.shape) * 0.2)
    return model


IDS = paddle.to_tensor(np.random.default_rng(0).integers(3, 64, (1, 12)))


def test_column_bounds_of_segments_and_masks():
    segments = paddle.to_tensor([[1, 1, 1, 2, 2, 3, 0, 0]])
    assert end_rows_from_segments(segments).numpy().tolist() == [[3, 3, 3, 5, 5, 6, 7, 8]]
    mask = paddle.to_tensor([[0, 1, 1, 0]])
    assert end_rows_from_mask(mask).numpy().tolist() == [[1, 4, 4, 4]]


def test_packed_documents_never_see_each_other():
    model = build()
    segments = paddle.to_tensor([[1] * 5 + [2] * 7])
    packed = model(IDS, segment_ids=segments).numpy()
    alone = [model(IDS[:, :5]).numpy(), model(IDS[:, 5:]).numpy()]
    assert np.abs(packed - np.concatenate(alone, 1)).max() < 1e-5
    changed = IDS.clone()
    changed[0, 2] = 7
    moved = np.abs(model(changed, segment_ids=segments).numpy() - packed).max(-1)[0]
    assert moved[5:].max() < 1e-5 and moved[2:5].min() > 1e-2


def test_gradients_do_not_cross_documents():
    model = build()
    segments = paddle.to_tensor([[1] * 5 + [2] * 7])
    ids = IDS.clone()
    ids[0, :5] = paddle.to_tensor([50, 51, 52, 53, 54])  # ids that the second document does not use
    ids[0, 5:] = paddle.to_tensor([10, 11, 12, 13, 14, 15, 16])
    model.model.embed_tokens.weight.stop_gradient = False
    hidden = model.trunk(ids, paddle.arange(12).unsqueeze(0), end_rows_from_segments(segments)).hidden_BSD
    hidden[:, 5:].sum().backward()
    gradient = model.model.embed_tokens.weight.grad.numpy()
    assert np.all(gradient[50:55] == 0) and np.abs(gradient[10:17]).min(1).max() > 0


def test_left_and_right_padding_leave_real_tokens_alone():
    model = build()
    plain = model(IDS).numpy()
    pad = paddle.zeros([1, 3], "int64")
    right = model(paddle.concat([IDS, pad], 1), attention_mask=paddle.to_tensor([[1] * 12 + [0] * 3])).numpy()
    positions = paddle.concat([pad, paddle.arange(12).unsqueeze(0)], 1)
    left = model(
        paddle.concat([pad, IDS], 1), attention_mask=paddle.to_tensor([[0] * 3 + [1] * 12]), position_ids=positions
    ).numpy()
    assert np.abs(right[:, :12] - plain).max() < 1e-5 and np.abs(left[:, 3:] - plain).max() < 1e-5


def test_mask_and_segments_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        build()(IDS, attention_mask=paddle.ones([1, 12]), segment_ids=paddle.ones([1, 12]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_recomputation_changes_no_gradient_bit(granularity):
    def gradients(recomputed):
        model = build(num_nextn_predict_layers=1)
        if recomputed:
            apply_recompute(model, granularity)
        model.train()
        trunk = model.trunk(IDS, paddle.arange(12).unsqueeze(0), paddle.full([1, 12], 12, "int32"))
        loss = trunk.hidden_BSD.sum() + trunk.mtp_hidden[0].square().sum() + trunk.routings[0].logits_ME.sum()
        loss.backward()
        return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert np.array_equal(gradient, recomputed[name]), name


def test_recomputation_keeps_parameter_names():
    model = build()
    before = [name for name, _ in model.named_parameters()]
    apply_recompute(model, "full")
    assert [name for name, _ in model.named_parameters()] == before


def test_cached_generation_equals_the_full_forward():
    model = build()
    prompt = IDS[0].tolist()
    generated = list(stream(model, prompt, max_new_tokens=10))
    ids = list(prompt)
    for _ in range(10):
        ids.append(model(paddle.to_tensor([ids]))[0, -1].argmax().item())
    assert generated == ids[12:]
    stop = generated[4]
    assert list(stream(model, prompt, max_new_tokens=10, stop_ids=[stop])) == generated[: generated.index(stop)]


def test_a_model_with_prediction_blocks_returns_plain_logits():
    with_blocks = build(num_nextn_predict_layers=1)
    without = build()
    own = dict(with_blocks.named_parameters())
    for name, p in without.named_parameters():
        p.set_value(own[name])
    assert np.array_equal(with_blocks(IDS).numpy(), without(IDS).numpy())


def test_prediction_block_sees_the_next_token_and_only_the_past():
    model = build(num_nextn_predict_layers=1)
    end = paddle.full([1, 12], 12, "int32")
    plain = model.trunk(IDS, paddle.arange(12).unsqueeze(0), end).mtp_hidden[0].numpy()
    changed = IDS.clone()
    changed[0, 6] = 1 + int(changed[0, 6]) % 60
    moved = model.trunk(changed, paddle.arange(12).unsqueeze(0), end).mtp_hidden[0].numpy()
    difference = np.abs(plain - moved).max(-1)[0]
    assert difference[:5].max() < 1e-5 and difference[5:11].min() > 1e-2  # position 5 joins the embedding of token 6


def test_prediction_blocks_see_the_same_however_much_padding_follows():
    """Their routers judge the last positions, too, of which no label is asked."""
    model = build(num_nextn_predict_layers=2)

    def logits(width):
        ids = paddle.concat([IDS, paddle.full([1, width - 12], model.config.pad_token_id, "int64")], 1)
        trunk = model.trunk(ids, paddle.arange(width).unsqueeze(0), paddle.full([1, width], 12, "int32"))
        return [routing.logits_ME[:12].numpy() for routing in trunk.routings]

    for narrow, wide in zip(logits(12), logits(16), strict=True):
        assert np.abs(narrow - wide).max() < 1e-5
