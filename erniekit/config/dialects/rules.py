"""What becomes of one setting of another toolkit: the few kinds of rules that the tables are made of.

A rule takes the value as it was written and tells the settings that say the same here. Knows no toolkit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from erniekit.config.values import Mismatch, Raw, parse, text_of

KEPT, CHANGED, LOST = "kept", "changed", "lost"
_MODULE = "(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Outcome:
    """Our settings for one of theirs; `reason` says what is different or why there are none."""

    settings: Mapping[str, Raw] = field(default_factory=dict)
    reason: str = ""

    @property
    def kind(self) -> str:
        """kept, changed or lost."""
        if not self.settings:
            return LOST
        return CHANGED if self.reason else KEPT


Rule = Callable[[Raw], Outcome]


@dataclass(frozen=True)
class Dialect:
    """One toolkit.

    marks      keys, with spaces between, that tell its files from those of others
    defaults   our settings (value and reason) for what its files leave unsaid, where our own default is another
    """

    name: str
    label: str
    marks: str
    rules: Mapping[str, Rule]
    defaults: Callable[[Mapping[str, Raw]], dict[str, tuple[Raw, str]]]
    speaks_ours: bool = False  # a key without a rule is ours, if we have one of that name


def to(name: str, note: str = "") -> Rule:
    """The key `name` with the same value; `note` says what is different all the same."""
    return lambda value: Outcome({name: value}, note)


def words(name: str, known: Mapping[str, Raw], note: str = "") -> Rule:
    """The key `name` with another word for each value; a value that is not known is lost."""

    def rule(value: Raw) -> Outcome:
        text = text_of(value).strip('"').lower()
        if text not in known:
            return Outcome(reason=f"{text} has no counterpart here")
        return Outcome({name: known[text]}, note)

    return rule


def negated(name: str, note: str = "") -> Rule:
    """The key `name` with the opposite truth."""

    def rule(value: Raw) -> Outcome:
        try:
            return Outcome({name: "false" if parse(value, bool) else "true"}, note)
        except Mismatch:
            return Outcome(reason="neither true nor false")

    return rule


def lost(reason: str) -> Rule:
    """No counterpart."""
    return lambda _: Outcome(reason=reason)


def all_lost(reasons: Mapping[str, str]) -> dict[str, Rule]:
    """Rules for keys without a counterpart: reason -> their names, with spaces between."""
    return {name: lost(reason) for reason, names in reasons.items() for name in names.split()}


def same(names: str) -> dict[str, Rule]:
    """Rules for keys that mean the same here under the same name."""
    return {name: to(name) for name in names.split()}


def model(value: Raw) -> Outcome:
    """The model: only ERNIE 4.5 can be trained here."""
    note = "" if "ernie" in text_of(value).lower() else "only ERNIE 4.5 models are trained here: name one"
    return Outcome({"model_name_or_path": value}, note)


def deepspeed(value: Raw) -> Outcome:
    """A ZeRO stage, as far as the name tells it: zero2, examples/deepspeed/ds_z3_offload_config.json."""
    text: Any = text_of(value).lower()
    stage = next((number for number in "123" if f"zero{number}" in text or f"z{number}" in text), None)
    if stage is None:
        return Outcome(reason="a DeepSpeed file; `sharding` (stage1 to stage3) is what shards here")
    settings = {"sharding": f"stage{stage}"} | ({"tensorwise_offload_optimizer": "true"} if "offload" in text else {})
    return Outcome(settings, "read from the name; other settings of that file are not known")


def scheduler_options(value: Raw) -> Outcome:
    """lr_scheduler_kwargs: min_lr is known."""
    try:
        options = parse(value, dict)
    except Mismatch:
        options = {}
    if "min_lr" not in options:
        return Outcome(reason="options of a schedule; min_lr, power, lr_end and decay_steps are keys here")
    note = "" if len(options) == 1 else "only min_lr is taken"
    return Outcome({"min_lr": text_of(options["min_lr"])}, note)


def targets(value: Raw) -> Outcome:
    """The modules that get an adapter: a word for all linear layers, or names."""
    given = [str(name) for name in value] if isinstance(value, list) else text_of(value).strip('"').split(",")
    names = [name.strip() for name in given]
    if set(names) & {"all", "all-linear"}:
        return Outcome({"lora_target_modules": "all-linear"}, "routed experts among them")
    if unknown := [name for name in names if not re.fullmatch(_MODULE, name)]:
        return Outcome(reason=f"no module of ERNIE 4.5: {', '.join(unknown)}")
    return Outcome({"lora_target_modules": list(names)})


def preference_defaults(found: Mapping[str, Raw]) -> dict[str, tuple[Raw, str]]:
    """What LLaMA-Factory and ms-swift leave unsaid in training on preferences, both as TRL has it."""
    if found.get("stage") not in ("DPO", "KTO"):
        return {}
    defaults: dict[str, tuple[Raw, str]] = {
        "normalize_logps": ("false", "there log-probabilities are summed as they are"),
        "mask_out_eos_token": ("false", "there the end of an answer counts"),
    }
    if found.get("loss_type") == "orpo":
        defaults["pref_loss_ratio"] = (found.get("beta", "0.1"), "there beta weighs the odds ratio")
    return defaults


def kept_back(value: Raw) -> Outcome:
    """Rows to evaluate on: a share of the training rows."""
    try:
        share = parse(value, float)
    except Mismatch:
        return Outcome(reason="not a number")
    if share >= 1:
        return Outcome(reason="a number of rows; here validation_split is a share")
    return Outcome({"validation_split": value}, "there of all rows together, here of each file")


TRAINER: dict[str, Rule] = {  # the Hugging Face trainer, which the others build on
    **same(
        "output_dir per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps warmup_ratio "
        "warmup_steps logging_dir logging_steps save_steps save_total_limit seed bf16 fp16 eval_steps run_name "
        "disable_tqdm load_best_model_at_end metric_for_best_model greater_is_better resume_from_checkpoint "
        "dataloader_drop_last ignore_data_skip ddp_find_unused_parameters "
        "max_new_tokens temperature top_p top_k repetition_penalty evaluation_strategy save_strategy logging_strategy "
        "logging_first_step label_names do_train do_eval do_predict"
    ),
    "eval_strategy": to("evaluation_strategy"),
    "report_to": to("report_to", "TensorBoard and train_log.jsonl are always written, too"),
    "dataloader_num_workers": to("dataloader_num_workers", "there they load batches, here they tokenise"),
    "overwrite_output_dir": to("overwrite_output_dir", "an old run is moved aside, never deleted"),
    "gradient_checkpointing": to("recompute"),
    "dataloader_prefetch_factor": to("prefetch_factor"),
    "hub_model_id": to("hf_hub_id"),
    "save_only_model": to("ignore_save_lr_and_optim"),
    "deepspeed": deepspeed,
    "lr_scheduler_kwargs": scheduler_options,
    "lr_scheduler_type": words(
        "lr_scheduler_type",
        {
            "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
            "polynomial": "polynomial", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
        },
    ),
    "optim": words(
        "optim", {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw": "adamw",
                  "adafactor": "adafactor", "sgd": "sgd", "muon": "muon"},
    ),
    **all_lost({
        "the tokenised data is cached by its content": "overwrite_cache load_from_cache_file preprocessing_batch_size",
        "`seed` decides the order of the data": "data_seed",
        "columns that are not known are not read": "remove_unused_columns",
        "weights are always written as safetensors": "save_safetensors",
        "matrices are computed as the device does it best": "tf32 torch_compile use_liger_kernel enable_liger_kernel",
        "attention is chosen by the device": "attn_impl flash_attn attn_implementation _attn_implementation",
        "one process trains here so far": "ddp_timeout fsdp fsdp_config local_rank ddp_backend ddp_bucket_cap_mb",
        "no code of a repository is ever run": "trust_remote_code",
        "pass the secret to the hub's own client": "hub_token hf_hub_token ms_hub_token om_hub_token",
        "an export is uploaded by hand": "push_to_hub",
        "rows are packed by length": "group_by_length length_column_name",
        "trained tokens are always counted": "include_num_input_tokens_seen include_tokens_per_second",
        "a non-finite loss stops the run": "logging_nan_inf_filter",
        "noise on the embeddings is not known here": "neftune_noise_alpha neftune",
        "only a preference loss smooths its labels": "label_smoothing_factor",
        "recomputation has no options of that kind": "gradient_checkpointing_kwargs use_reentrant_gc",
        "batches are arranged by the program": "dataloader_pin_memory dataloader_persistent_workers",
    }),
}  # fmt: skip
