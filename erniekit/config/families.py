"""The published ERNIE 4.5 families and small presets, with parameter and FLOP counts in closed form.

Nothing here allocates, downloads or reads a file. Values marked "inferred" were never read from a config.json: they
follow from published sizes and parameter counts. A checkpoint's own config.json always wins over a preset.
"""

from __future__ import annotations

from typing import Any

from erniekit.base.errors import ConfigError, did_you_mean
from erniekit.config.architecture import ErnieConfig
from erniekit.config.sizes import VisionSizes, expert_groups

_COMMON: dict[str, Any] = dict(
    bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000,
    max_position_embeddings=131072, vocab_size=103424, use_bias=False, use_cache=False, dtype="bfloat16",
)  # fmt: skip
_MOE: dict[str, Any] = dict(
    model_type="ernie4_5_moe", moe_gate="topk", moe_layer_interval=1, moe_norm_min=1e-12, moe_use_aux_free=True
)
_VL: dict[str, Any] = dict(
    model_type="ernie4_5_moe_vl",
    num_nextn_predict_layers=0,  # inferred for the 424B
    # A head of its own is stored: the hub counts 29.66 B for the 28B, 29.40 B without (inferred for the 424B).
    tie_word_embeddings=False,
    rope_3d=True, freq_allocation=20, mm_vocab_size=0, modality_detach=False, moe_use_hard_gate=True,
    moe_dense_experts_token_type_id=3, im_patch_id=100295, image_start_token_id=101304, image_end_token_id=101305,
    video_start_token_id=101306, video_end_token_id=101307, pixel_hidden_size=1280, spatial_conv_size=2,
    temporal_conv_size=2, use_temporal_conv=True,
    vision_config=dict(
        attn_sep=False, depth=32, embed_dim=1280, hidden_size=1280, hidden_act="quick_gelu", in_channels=3, mlp_ratio=4,
        model_type="DFNRope_vision_transformer", num_heads=16, patch_size=14, spatial_merge_size=2,
    ),
)  # fmt: skip

_0_3B = dict(
    _COMMON, model_type="ernie4_5", hidden_size=1024, intermediate_size=3072, num_hidden_layers=18,
    num_attention_heads=16, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
_21B = dict(
    _COMMON, **_MOE, hidden_size=2560, intermediate_size=12288, num_hidden_layers=28, num_attention_heads=20,
    num_key_value_heads=4, head_dim=128, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536,
    moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=27, moe_capacity=[64, 64, 64],
    tie_word_embeddings=True,
    num_nextn_predict_layers=1,  # 12 such tensors in the published -PT index, none in the -Paddle dump
)  # fmt: skip
_300B = dict(
    _COMMON, **_MOE, hidden_size=8192, intermediate_size=28672, num_hidden_layers=54, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, moe_num_experts=64, moe_k=8, moe_intermediate_size=3584,
    moe_num_shared_experts=0, moe_layer_start_index=3, moe_layer_end_index=53, moe_capacity=[64, 64, 64],
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,  # inferred from another project's copy of the config
)  # fmt: skip
_VL_28B = {
    **_21B, **_VL, "moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
}  # fmt: skip
_VL_424B = {  # inferred throughout from the 300B, the model card and the parameter count
    **_300B, **_VL, "moe_num_experts": [64, 64], "moe_intermediate_size": [3584, 1536], "moe_layer_start_index": [3, 3],
    "moe_layer_end_index": [53, 53],
}  # fmt: skip


def _small_moe(
    *, hidden: int, dense: int, experts: int, width: int, shared: int, layers: int, vocab: int
) -> dict[str, Any]:
    """A mixture of experts with a dense first layer, four heads on two key-value heads, and tied embeddings."""
    return dict(
        _COMMON, **_MOE, hidden_size=hidden, intermediate_size=dense, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=hidden // 4, moe_num_experts=experts, moe_k=2, moe_intermediate_size=width,
        moe_num_shared_experts=shared, moe_layer_start_index=1, moe_layer_end_index=layers - 1,
        moe_capacity=[experts] * 3, tie_word_embeddings=True,
    ) | dict(vocab_size=vocab, max_position_embeddings=8192)  # fmt: skip


def _small_dense(*, hidden: int, dense: int, layers: int, vocab: int) -> dict[str, Any]:
    return _0_3B | dict(
        hidden_size=hidden, intermediate_size=dense, num_hidden_layers=layers, num_attention_heads=4,
        head_dim=hidden // 4, vocab_size=vocab, max_position_embeddings=8192,
    )  # fmt: skip


SMALL_PRESETS: dict[str, dict[str, Any]] = {
    "tiny-moe": _small_moe(hidden=256, dense=1024, experts=8, width=256, shared=2, layers=4, vocab=8192),
    "tiny-dense": _small_dense(hidden=256, dense=1024, layers=6, vocab=8192),
    "micro-moe": _small_moe(hidden=64, dense=128, experts=4, width=32, shared=1, layers=3, vocab=512),
    "micro-dense": _small_dense(hidden=64, dense=128, layers=2, vocab=512),
    "bench-moe": _small_moe(hidden=256, dense=1024, experts=8, width=256, shared=1, layers=4, vocab=8192),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "ERNIE-4.5-0.3B": _0_3B,
    "ERNIE-4.5-21B-A3B": _21B,
    "ERNIE-4.5-21B-A3B-Thinking": _21B,
    "ERNIE-4.5-300B-A47B": _300B,
    "ERNIE-4.5-VL-28B-A3B": _VL_28B,
    "ERNIE-4.5-VL-28B-A3B-Thinking": _VL_28B,
    "ERNIE-4.5-VL-424B-A47B": _VL_424B,
    **SMALL_PRESETS,
}


def family_name(name: str) -> str:
    """The key in FAMILIES that `name` means: "0.3b", "baidu/ERNIE-4.5-0.3B-Base-PT" -> "ERNIE-4.5-0.3B".

    Raises ConfigError naming all families.
    """
    short = name.rsplit("/", 1)[-1].lower()
    while short.endswith(suffixes := ("-base", "-pt", "-paddle")):
        short = short[: -next(len(suffix) for suffix in suffixes if short.endswith(suffix))]
    known = {key.lower(): key for key in FAMILIES}
    found = known.get(short) or known.get(f"ernie-4.5-{short}")
    if found is None:
        raise ConfigError(f"unknown family '{name}'.{did_you_mean(name, FAMILIES)} Known: {', '.join(FAMILIES)}.")
    return found


def family(name: str) -> ErnieConfig:
    """The architecture of a published family or small preset, under any of its published names."""
    key = family_name(name)
    return ErnieConfig.from_dict(FAMILIES[key], source=key)


# ---------------------------------------------------------------------- counts
def _mlp(cfg: ErnieConfig, width: int, *, bias: bool) -> int:
    return 3 * cfg.hidden_size * width + bias * (2 * width + cfg.hidden_size)


def _attention(cfg: ErnieConfig) -> int:
    fused = cfg.q_dim + 2 * cfg.kv_dim
    return cfg.hidden_size * (fused + cfg.q_dim) + cfg.use_bias * (fused + cfg.hidden_size)


def _layer(cfg: ErnieConfig, layer: int, *, active: bool) -> int:
    """Parameters of one decoder layer; with `active`, of those that one text token meets."""
    total = _attention(cfg) + 2 * cfg.hidden_size
    if not cfg.is_sparse(layer):
        return total + _mlp(cfg, cfg.intermediate_size, bias=cfg.use_bias)
    for experts, width in expert_groups(cfg)[: 1 if active else None]:
        total += (cfg.moe_k if active else experts) * _mlp(cfg, width, bias=False)
        total += experts * cfg.hidden_size + experts * (not active)  # router, correction bias
    if cfg.moe_num_shared_experts:
        total += _mlp(cfg, cfg.shared_intermediate_size, bias=cfg.use_bias)
    return total


def _mtp(cfg: ErnieConfig, *, active: bool) -> int:
    """Parameters of all multi-token prediction blocks: a layer, two norms and a projection [2H, H] each."""
    hidden = cfg.hidden_size
    extra = 2 * hidden + 2 * hidden * hidden
    return sum(_layer(cfg, i, active=active) + extra for i in range(cfg.num_nextn_predict_layers))


def _vision(cfg: ErnieConfig) -> int:
    sizes = VisionSizes.of(cfg)
    width, merged, hidden = sizes.width, sizes.merged, cfg.hidden_size
    block = 4 * width * width + 4 * width + 2 * width * sizes.mlp + sizes.mlp + width + 4 * width
    tower = sizes.patch * width + sizes.depth * block + 2 * width
    square, norm = merged * merged + merged, 2 * merged
    temporal = sizes.frames * merged + merged + square + norm if sizes.frames else 0
    return tower + 2 * square + norm + temporal + merged * hidden + 2 * hidden


def count_parameters(cfg: ErnieConfig) -> int:
    """All stored parameters (multi-token prediction and correction biases included, a tied head counted once)."""
    tables = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_word_embeddings else 2)
    layers = sum(_layer(cfg, i, active=False) for i in range(cfg.num_hidden_layers))
    return tables + layers + cfg.hidden_size + _mtp(cfg, active=False) + (_vision(cfg) if cfg.is_vl else 0)


def count_active_parameters(cfg: ErnieConfig) -> int:
    """Parameters that one text token meets, without embedding table, head and multi-token prediction.

    This is the "A3B" and "A47B" of the published names.
    """
    return sum(_layer(cfg, i, active=True) for i in range(cfg.num_hidden_layers)) + cfg.hidden_size


def flops_per_token(cfg: ErnieConfig, seq_len: int) -> int:
    """Floating-point operations of one training step per token: 6N + attention.

    N is the active parameters, the output head, and the same again for multi-token prediction blocks. Attention counts
    what a causal mask leaves: half of the square, 6 x layers x q_dim x seq_len (forward and backward). Recomputation is
    not counted.
    """
    blocks = cfg.num_nextn_predict_layers
    head = cfg.vocab_size * cfg.hidden_size * (1 + blocks)
    matmuls = count_active_parameters(cfg) + head + _mtp(cfg, active=True)
    return 6 * matmuls + 6 * (cfg.num_hidden_layers + blocks) * cfg.q_dim * seq_len
