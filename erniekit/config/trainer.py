"""Keys of ERNIEKit's trainer that have nothing left to do here: its roles, reports and ways of saving.

A verb says what is done (no do_train), the first rank logs, and checkpoints have one form that any layout reads.
"""

from dataclasses import dataclass

from erniekit.config.keys import inert, later, speed


@dataclass(frozen=True)
class TrainerConfig:
    """Accepted for the sake of existing files."""

    do_train: bool = inert(False, "The verb decides.", idle=(True,))
    do_eval: bool = inert(False, "The verb decides, and evaluation_strategy in training.", idle=(True,))
    do_predict: bool = inert(False, "The verb decides.")
    do_export: bool = inert(False, "The verb decides.")
    prediction_loss_only: bool = inert(False, "Evaluation returns the loss and counts.")
    past_index: int = inert(-1, "Not used by a language model.")
    local_rank: int = inert(-1, "Ranks are found out.")
    log_on_each_node: bool = inert(True, "The first rank logs.")
    log_global_grad_norm: bool | None = inert(False, "The gradient norm is always logged.", idle=(True,))
    global_logging_interval: int = inert(1, "logging_steps decides.")
    enable_global_training_logs: bool = inert(False, "The first rank logs for all.")
    record_optimizer_stat: bool | None = inert(False, "The gradient norm is logged; states are in the checkpoints.")
    count_trained_tokens: bool = inert(False, "Trained tokens are counted in the log.", idle=(True,))
    skip_profile_timer: bool = inert(True, "Tokens per second are always logged.")
    output_signal_dir: str | None = inert(None, "Folder for signals between machines.")
    sft_benchmark: bool = inert(False, "Tokens per second are always logged.")
    eval_accumulation_steps: int | None = speed(None, "Move evaluation results to the host so often.")

    unified_checkpoint: bool = inert(False, "Checkpoints are always readable under any layout.", idle=(True,))
    unified_checkpoint_config: str | None = inert(None, "Ways of saving.")
    save_sharded_model: bool = inert(False, "Ways of saving.")
    load_sharded_model: bool = inert(False, "Ways of loading.")
    load_sharded_model_remap_parameter_name: bool = inert(False, "Ways of loading.")
    save_sharding_stage1_model_include_freeze_params: bool = inert(False, "Checkpoints are always whole.", idle=(True,))
    force_reshard_pp: bool = inert(False, "Checkpoints are readable under any layout.")
    auto_parallel_resume_form_hybrid_parallel: bool = inert(False, "Checkpoints are readable under any layout.")
    disable_ckpt_quant: bool = inert(False, "Checkpoints are never quantised.", idle=(True,))
    ckpt_quant_stage: str = later("O0", "Quantise optimizer states in checkpoints.", idle=("O0",))
    save_to_hf: bool = inert(True, "`save_layout` decides.")
    save_on_each_node: bool = inert(False, "A checkpoint is one folder.")
    save_tokenizer: bool = inert(True, "The tokenizer is always saved.")
    save_rng_states: bool = inert(True, "Random states are always saved.")
    ignore_save_lr_and_optim: bool = later(False, "Save weights only.")
    ignore_load_lr_and_optim: bool = later(False, "Resume weights only.")
    reshard_save_then_exit: bool | None = later(False, "Save under another layout and stop.")
    pdc_download_ckpt: bool = later(False, "Download the checkpoint to resume from.")
    pdc_download_timeout: int = inert(300, "Seconds for that download.")
    ordered_save_group_size: int = speed(0, "Ranks that save at a time.")
    flash_device_save_steps: int = speed(0, "Steps between checkpoints in memory.")
    enable_zero_cost_checkpoint: bool = speed(False, "Checkpoints in memory.")
    zcc_workers_num: int = speed(3, "Processes of in-memory checkpoints.")
    zcc_pipeline_hooks_capacity_usage: float = speed(0.6, "Share of pipeline hooks that copy.")
