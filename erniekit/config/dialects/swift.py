"""ms-swift's YAML files (`swift sft --config FILE`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from erniekit.config.dialects.rules import (
    TRAINER,
    Dialect,
    Outcome,
    Rule,
    all_lost,
    kept_back,
    model,
    preference_defaults,
    same,
    targets,
    to,
    words,
)
from erniekit.config.values import Mismatch, Raw, parse, text_of

_FILE = re.compile(r".+\.(jsonl?|csv|parquet|txt)")
_STAGES = {name: name.upper() for name in ("dpo", "kto", "rm", "ppo", "grpo")}
_LOSSES = {
    **{name: name for name in ("sigmoid", "hinge", "ipo", "robust", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
                               "simpo", "orpo")},
    "exo_pair": "exo", "bco_pair": "bco", "aot_pair": "aot",
}  # fmt: skip


def _files(name: str) -> Rule:
    """dataset and val_dataset: paths are taken, names of data sets are not, nor a number of rows behind '#'."""

    def rule(value: Raw) -> Outcome:
        given = [str(item) for item in value] if isinstance(value, list) else str(value).split()
        paths = [item.partition("#")[0] for item in given]
        names = [path for path in paths if not _FILE.fullmatch(path)]
        if names or not paths:
            return Outcome(reason="names of data sets: write the files")
        note = "the type is told by the first row of each file"
        if any("#" in item for item in given):
            note += "; every row is read, whatever stands behind '#'"
        return Outcome({name: list(paths)}, note)

    return rule


def _columns(value: Raw) -> Outcome:
    """There {the file's name: swift's}, here {our name: the file's}."""
    try:
        table = parse(value, dict)
    except Mismatch:
        return Outcome(reason="not a mapping")
    turned: dict[str, Raw] = {str(ours): str(theirs) for theirs, ours in table.items()}
    return Outcome({"columns": turned}, "turned round: our name first")


def _alignment(value: Raw) -> Outcome:
    text = text_of(value).lower()
    if text in ("simpo", "orpo"):
        return Outcome({"stage": "DPO", "loss_type": text})
    return words("stage", _STAGES)(value)


def _quantised(value: Raw) -> Outcome:
    return words("compute_type", {"4": "nf4", "8": "wint8"}, "quantised by another method")(value)


def _defaults(found: Mapping[str, Raw]) -> dict[str, tuple[Raw, str]]:
    lora = str(found.get("fine_tuning", "LoRA")) == "LoRA"
    defaults: dict[str, tuple[Raw, str]] = {
        "fine_tuning": ("LoRA", "there the default is lora, here it is Full"),
        "download_hub": ("modelscope", "there models come from ModelScope"),
        "packing": ("false", "there samples are not packed by default"),
        "learning_rate": ("1e-4" if lora else "1e-5", "there the default"),
        "lr_scheduler_type": ("cosine", "there the default"),
        "weight_decay": ("0.1", "there the default"),
        "adam_beta2": ("0.95", "there the default"),
        "batch_size": ("1", "there the default"),
        "num_train_epochs": ("3.0", "there the default"),
        "logging_steps": ("5", "there the default"),
    }
    mixed = "interleave_under" if "train_dataset_prob" in found else "concat"
    defaults["mix_strategy"] = (mixed, "there the default")
    if lora:
        defaults["lora_alpha"] = ("32", "there the default, here twice the rank")
        defaults["lora_dropout"] = ("0.05", "there the default")
    if found.get("loss_type") == "simpo":
        defaults["beta"] = ("2.0", "there the default of simpo")
        defaults["simpo_gamma"] = ("1.0", "there the default")
        defaults["sft_loss_ratio"] = ("1.0", "there the default of cpo_alpha")
    return defaults | preference_defaults(found)


SWIFT = Dialect(
    "swift", "ms-swift",
    marks="model train_type tuner_type sft_type torch_dtype max_length rlhf_type dataset_num_proc split_dataset_ratio "
        "target_modules val_dataset freeze_vit freeze_llm freeze_aligner truncation_strategy padding_free loss_scale "
        "model_id_or_path use_hf add_version init_weights lorap_lr_ratio quant_bits quant_method rpo_alpha "
        "lora_target_modules dataset_shuffle interleave_prob sequence_parallel_size model_author",
    rules={
        **TRAINER,
        **same("lora_rank lora_alpha lora_dropout modules_to_save packing beta label_smoothing simpo_gamma "
               "enable_thinking"),
        "desirable_weight": to("kto_desirable_weight"),
        "undesirable_weight": to("kto_undesirable_weight"),
        "loss_type": words("loss_type", _LOSSES),
        "model": model,
        "model_id_or_path": model,
        "use_hf": words("download_hub", {"true": "huggingface", "false": "modelscope", "1": "huggingface",
                                         "0": "modelscope"}),
        **dict.fromkeys(
            ("train_type", "tuner_type", "sft_type"), words("fine_tuning", {"lora": "LoRA", "full": "Full"})
        ),
        **dict.fromkeys(
            ("torch_dtype", "dtype"),
            words("compute_type", {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16",
                                   "float32": "fp32", "fp32": "fp32"}),
        ),
        "dataset": _files("train_dataset_path"),
        "val_dataset": _files("eval_dataset_path"),
        "columns": _columns,
        "max_length": to("max_seq_len", "there longer rows are dropped by default; here the samples ledger lists them"),
        "rlhf_type": _alignment,
        "freeze_parameters_regex": to("freeze", "looked for in the names of the parameters as they are here"),
        "rpo_alpha": to("sft_loss_ratio"),
        "cpo_alpha": to("sft_loss_ratio"),
        **dict.fromkeys(("target_modules", "lora_target_modules"), targets),
        "target_regex": to("lora_target_modules", "looked for in the names of the modules as they are here"),
        "lora_dropout_p": to("lora_dropout"),
        "init_weights": words("lora_init", {"true": "default", "pissa": "pissa"}),
        "use_rslora": to("rslora"),
        "use_dora": to("dora"),
        "lorap_lr_ratio": to("lora_plus_scale"),
        "adapters": to("lora_path", "one adapter can be given here"),
        "dataset_shuffle": to("random_shuffle"),
        "interleave_prob": to("train_dataset_prob"),
        "stopping_strategy": words(
            "mix_strategy", {"first_exhausted": "interleave_under", "all_exhausted": "interleave_over"},
            "there it counts with interleave_prob only",
        ),
        "router_aux_loss_coef": to("moe_aux_loss_lambda", "there over all layers together, here layer by layer"),
        "sequence_parallel_size": to("sep_parallel_degree"),
        "expert_parallel_size": to("expert_parallel_degree"),
        "context_parallel_size": to("context_parallel_degree"),
        "quant_bits": _quantised,
        "optimizer": words("optim", {"muon": "muon", "adamw": "adamw"}),
        "split_dataset_ratio": kept_back,
        "dataset_num_proc": to("dataloader_num_workers"),
        "early_stop_interval": to("early_stopping_patience"),
        **all_lost({
            "config.json says it": "model_type task_type num_labels problem_type rope_scaling max_model_len",
            "the tokenizer's own template is used": "template template_backend agent_template system use_chat_template "
                "response_prefix",
            "templates of thinking models decide": "preserve_thinking add_non_thinking_prefix",
            "too long rows keep their system text and last turns": "truncation_strategy",
            "every answer of a dialogue is trained with weight 1": "loss_scale",
            "write `experts` into lora_target_modules": "target_parameters",
            "biases are not trained with adapters": "lora_bias",
            "adapters have the number format of the run": "lora_dtype",
            "write patterns of names into `freeze`": "freeze_parameters "
                "freeze_parameters_ratio trainable_parameters trainable_parameters_regex",
            "pictures and video are not trained yet": "freeze_llm freeze_vit freeze_aligner vit_lr aligner_lr "
                "max_pixels norm_bbox vit_gradient_checkpointing",
            "rows are packed or padded to a batch's longest": "padding_free padding_side",
            "data is always read as a stream": "streaming shuffle_buffer_size download_mode",
            "every bad row is dropped and listed; too many stop the run": "strict",
            "no column is guessed": "disable_auto_column_mapping",
            "that data set is not known here": "model_name model_author custom_dataset_info cached_dataset "
                "cached_val_dataset val_dataset_shuffle",
            "output_dir is taken as it is": "add_version create_checkpoint_symlink",
            "the same command resumes": "load_args resume_only_model",
            "quantised by one method": "quant_method bnb_4bit_compute_dtype bnb_4bit_quant_type",
            "the reference is the model that training starts from": "ref_model ref_adapters ref_model_type",
            "that loss is not known here": "ld_alpha loss_weights",
            "the hub's own client says where downloads lie": "model_revision local_repo_path",
            "tokens are added once, by `erniekit resize-vocab`": "new_special_tokens",
            "one device trains here so far": "device_map max_memory zero_hpz_partition_size deepspeed_autotp_size",
            "the logger has no options here": "swanlab_token swanlab_project swanlab_workspace swanlab_exp_name "
                "swanlab_mode",
            "that optimizer is not known here": "use_galore galore_rank galore_target_modules lisa_activated_layers",
            "adapters of other kinds are not known here": "tuner_backend experts_impl",
        }),
    },
    defaults=_defaults,
)  # fmt: skip
