"""ERNIEKit 1.x, whose keys are ours, and PaddleFormers' command line, whose keys nearly are."""

from __future__ import annotations

from collections.abc import Mapping

from erniekit.config.dialects.rules import Dialect, all_lost, to, words
from erniekit.config.values import Raw

_LORA = "there the default is LoRA, here it is Full"


def _erniekit_defaults(found: Mapping[str, Raw]) -> dict[str, tuple[Raw, str]]:
    defaults: dict[str, tuple[Raw, str]] = {}
    if "train_dataset_path" in found:
        defaults["fine_tuning"] = ("LoRA", _LORA)
        if isinstance(found["train_dataset_path"], list) or "," in str(found["train_dataset_path"]):
            defaults["num_samples_each_epoch"] = ("6000000", "there the default")
    return defaults


def _paddleformers_defaults(found: Mapping[str, Raw]) -> dict[str, tuple[Raw, str]]:
    if "train_dataset_path" not in found:
        return {}
    defaults: dict[str, tuple[Raw, str]] = {
        "fine_tuning": ("LoRA", _LORA),
        "packing": ("false", "there samples are not packed by default"),
        "mix_strategy": ("concat", "there several files are read one after the other by default"),
    }
    if str(found.get("stage", "")).upper() == "DPO":
        defaults["normalize_logps"] = ("false", "there the default is false, here (as in ERNIEKit) true")
    return defaults


ERNIEKIT = Dialect(
    "erniekit", "ERNIEKit", marks="", rules={}, defaults=_erniekit_defaults, speaks_ours=True
)

PADDLEFORMERS = Dialect(
    "paddleformers", "PaddleFormers",
    marks="attn_impl _attn_implementation template template_backend use_template encode_one_turn truncate_packing "
        "data_impl data_cache tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
        "sharding_parallel_size context_parallel_size save_checkpoint_format load_checkpoint_format benchmark "
        "autotuner_benchmark moe_token_dispatcher_type moe_router_bias_update_rate "
        "loss_subbatch_sequence_length recompute_method recompute_num_layers tokenizer_name_or_path ignore_eos_token "
        "neftune pissa use_quick_lora",
    rules={
        "tensor_model_parallel_size": to("tensor_parallel_degree"),
        "pipeline_model_parallel_size": to("pipeline_parallel_degree"),
        "expert_model_parallel_size": to("expert_parallel_degree"),
        "context_parallel_size": to("context_parallel_degree"),
        "sharding_parallel_size": to("sharding_parallel_degree"),
        "loss_subbatch_sequence_length": to("loss_subbatch_seqlen"),
        "tokenizer_name_or_path": to("tokenizer_name"),
        "moe_router_bias_update_rate": to("moe_use_aux_free_update_coef"),
        "ignore_eos_token": to("mask_out_eos_token"),
        "pissa": words("lora_init", {"true": "pissa", "false": "default", "1": "pissa", "0": "default"}),
        "template": words("chat_template", {"ernie_vl": "ernie_vl", "ernie_vl_thinking": "ernie_vl_thinking"}),
        **all_lost({
            "attention is chosen by the device": "attn_impl _attn_implementation",
            "the tokenizer's template is rendered as it is": "template_backend use_template encode_one_turn",
            "text of any length is split, not cut": "truncate_packing",
            "the tokenised data is cached by its content": "data_cache data_impl skip_warmup",
            "checkpoints are always whole": "save_checkpoint_format load_checkpoint_format load_via_cpu",
            "weights are always written as safetensors": "save_safetensors",
            "tokens per second are always logged": "benchmark autotuner_benchmark",
            "recompute_granularity says what is computed again":
                "recompute_method recompute_num_layers recompute_modules",
            "noise on the embeddings is not known here": "neftune neftune_noise_alpha",
            "adapters are plain LoRA": "use_quick_lora lora_use_mixer use_mora",
            "the program arranges how devices talk":
                "moe_token_dispatcher_type overlap_p2p_comm batch_p2p_comm best_unbalanced_scheduler offload_queue",
            "operators are fused by the device": "fuse_attention_qkv fuse_attention_ffn use_fast_layer_norm",
            "eval_generate answers prompts": "eval_with_do_generation",
            "every machine reads its own folder": "share_folder",
        }),
    },
    defaults=_paddleformers_defaults,
    speaks_ours=True,
)  # fmt: skip
