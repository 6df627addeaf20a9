"""LLaMA-Factory's YAML files."""

from __future__ import annotations

from collections.abc import Mapping

from erniekit.config.dialects.rules import (
    TRAINER,
    Dialect,
    all_lost,
    kept_back,
    model,
    negated,
    preference_defaults,
    same,
    targets,
    to,
    words,
)
from erniekit.config.values import Raw

_NAMES = "names stand in LLaMA-Factory's dataset_info.json: write the files and their type (alpaca, chatml)"
_CACHE = "the hub's own client says where downloads lie (HF_HOME)"


def _defaults(found: Mapping[str, Raw]) -> dict[str, tuple[Raw, str]]:
    defaults: dict[str, tuple[Raw, str]] = {
        "fine_tuning": ("LoRA", "there the default is lora, here it is Full"),
        "max_seq_len": ("2048", "there the default of cutoff_len"),
        "packing": ("true" if found.get("stage") == "PT" else "false", "there packed in pre-training only, by default"),
        "mix_strategy": ("concat", "there the default"),
        "batch_size": ("8", "there the default of per_device_train_batch_size"),
        "num_train_epochs": ("3.0", "there the default"),
        "logging_steps": ("500", "there the default"),
    }
    return defaults | preference_defaults(found)


LLAMA_FACTORY = Dialect(
    "llamafactory", "LLaMA-Factory",
    marks="finetuning_type cutoff_len lora_target dataset_dir flash_attn preprocessing_num_workers plot_loss pref_beta "
        "pref_loss val_size max_samples eval_dataset quantization_bit loraplus_lr_ratio export_dir export_size "
        "adapter_name_or_path neat_packing enable_liger_kernel freeze_trainable_layers mask_history "
        "train_on_prompt interleave_probs tokenized_path infer_backend upcast_layernorm use_swanlab",
    rules={
        **TRAINER,
        **same("lora_rank lora_alpha lora_dropout mix_strategy simpo_gamma enable_thinking"),
        "model_name_or_path": model,
        "stage": words("stage", {name: name.upper() for name in ("pt", "sft", "rm", "ppo", "dpo", "kto")}),
        "finetuning_type": words("fine_tuning", {"lora": "LoRA", "full": "Full"}),
        "adapter_name_or_path": to("lora_path", "one adapter can be given here"),
        "cutoff_len": to("max_seq_len"),
        "interleave_probs": to("train_dataset_prob"),
        "packing": to("packing", "here packed samples never see each other"),
        "neat_packing": to("packing"),
        "disable_shuffling": negated("random_shuffle"),
        "disable_gradient_checkpointing": negated("recompute"),
        "lora_target": targets,
        "additional_target": to("modules_to_save"),
        "loraplus_lr_ratio": to("lora_plus_scale"),
        "use_rslora": to("rslora"),
        "use_dora": to("dora"),
        "pissa_init": words("lora_init", {"true": "pissa", "false": "default"}),
        "pref_beta": to("beta"),
        "pref_ftx": to("sft_loss_ratio"),
        "pref_loss": words(
            "loss_type", {name: name for name in ("sigmoid", "hinge", "ipo", "kto_pair", "simpo", "orpo")}
        ),
        "dpo_label_smoothing": to("label_smoothing"),
        "kto_chosen_weight": to("kto_desirable_weight"),
        "kto_rejected_weight": to("kto_undesirable_weight"),
        "moe_aux_loss_coef": to("moe_aux_loss_lambda", "there over all layers together, here layer by layer"),
        "quantization_bit": words("compute_type", {"4": "nf4", "8": "wint8"}, "quantised by another method"),
        "export_size": to("max_shard_size"),
        "use_muon": words("optim", {"true": "muon"}),
        "use_adam_mini": words("optim", {"true": "adamw_mini"}),
        "use_swanlab": words("report_to", {"true": "swanlab"}),
        "val_size": kept_back,
        "preprocessing_num_workers": to("dataloader_num_workers"),
        "early_stopping_steps": to("early_stopping_patience"),
        **all_lost({
            _NAMES: "dataset eval_dataset dataset_dir",
            "pictures and video are not trained yet": "media_dir freeze_vision_tower freeze_multi_modal_projector "
                "freeze_language_model image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps "
                "video_maxlen image_do_pan_and_scan crop_to_patches use_audio_in_video audio_sampling_rate",
            "the tokenizer's own template is used": "template tool_format default_system",
            "templates of thinking models decide": "reasoning_effort preserve_thinking",
            "every answer of a dialogue is trained, nothing else": "train_on_prompt mask_history",
            "data is always read as a stream": "streaming",
            "there a buffer of shuffling, here one of packing": "buffer_size",
            "every row is read: shorten the file": "max_samples",
            "padding is never trained": "ignore_pad_token_for_loss",
            "evaluation is reported by file anyway": "eval_on_each_dataset",
            "answers are greedy or sampled": "eval_num_beams",
            "the tokenised data is cached by its content": "tokenized_path",
            "PiSSA is computed exactly": "pissa_iter",
            "a PiSSA adapter is always saved as plain LoRA": "pissa_convert",
            "adapters are low-rank ones": "oft_rank oft_block_size oft_target",
            "an adapter that is given is trained on": "create_new_adapter adapter_folder",
            "LoRA+ of embeddings is not known here": "loraplus_lr_embedding",
            "write patterns of names into `freeze`":
                "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro",
            "the reference is the model that training starts from": "ref_model ref_model_adapters "
                "ref_model_quantization_bit",
            "that loss is not known here": "pref_bco_weight ld_alpha",
            "PPO is not built": "reward_model reward_model_adapters reward_model_quantization_bit "
                "reward_model_type ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards",
            "that optimizer is not known here": "use_galore galore_target galore_rank galore_update_interval "
                "galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank "
                "apollo_update_interval apollo_scale use_badam badam_mode badam_switch_mode badam_switch_interval "
                "badam_update_ratio",
            _CACHE: "cache_dir model_revision",
            "tokens are added once, by `erniekit resize-vocab`": "resize_vocab add_tokens add_special_tokens "
                "new_special_tokens_config init_special_tokens",
            "there is one tokenizer": "use_fast_tokenizer split_special_tokens",
            "the model is read as a stream": "low_cpu_mem_usage offload_folder",
            "the model's own config.json says it": "rope_scaling shift_attn mixture_of_depths",
            "the program chooses its kernels": "use_unsloth use_unsloth_gc use_v1_kernels",
            "norms and logits are computed in fp32": "upcast_layernorm upcast_lmhead_output",
            "weights are kept in fp32 while training": "pure_bf16",
            "`erniekit init` makes a model with random weights": "train_from_scratch",
            "there is no server yet": "infer_backend infer_dtype use_kv_cache vllm_maxlen vllm_gpu_util "
                "vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen",
            "quantised by one method": "quantization_method quantization_type double_quantization "
                "quantization_device_map",
            "`erniekit export --out DIR` says where": "export_dir export_device export_legacy_format "
                "export_hub_model_id export_quantization_bit export_quantization_dataset export_quantization_nsamples "
                "export_quantization_maxlen",
            "curves are in the report of the run": "plot_loss",
            "accuracy is always measured": "compute_accuracy",
            "the logger has no options here": "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
                "swanlab_api_key swanlab_logdir",
            "eval_generate=N answers N prompts": "predict_with_generate do_sample num_beams generation_max_length",
            "no effect on training": "print_param_status ray_run_name ray_num_workers resources_per_worker",
        }),
    },
    defaults=_defaults,
)  # fmt: skip
