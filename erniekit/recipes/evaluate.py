"""`eval`: loss, perplexity and token accuracy of a model on the eval set, and how near its answers come to the file.

With a stage of preferences: how well the model, or a reward model, tells better answers from worse ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import paddle

from erniekit.adapters.lora import adapter_config_of
from erniekit.base import runtime
from erniekit.base.console import notice
from erniekit.base.errors import ConfigError
from erniekit.base.files import atomic_write, write_json, writing
from erniekit.base.progress import ByteProgress
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.chosen import adapter_of
from erniekit.checkpoint.download import locate_model
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_for_answers, require_alone
from erniekit.checkpoint.quantised_folder import open_to_answer, require_whole_matrices
from erniekit.config.layout import layout_of
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.packing import packing_of
from erniekit.config.readiness import require_ready
from erniekit.config.run import KEYS, RunConfig
from erniekit.data.build import EvalData, build_eval_data
from erniekit.data.rendering import choose_template
from erniekit.data.tokenizer import Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.cpu.library import tier
from erniekit.parallel.mesh import Mesh, open_mesh
from erniekit.parallel.tokens import TokenRanks
from erniekit.rollout.generate import generate_batch, prompt_text
from erniekit.rollout.judge import Judged, figures, judge
from erniekit.rollout.sampling import Sampling, eos_ids, read_generation_config
from erniekit.training.evaluate import measure, short_names
from erniekit.training.fidelity import Rows, kept_of, quantised_figures, reference_of
from erniekit.training.held_out import measure_preferences
from erniekit.training.objective import LossWeights
from erniekit.training.preference import PreferenceObjective, preference_objective
from erniekit.training.ranks import facts_of, first_alone, require_same_data, require_same_model
from erniekit.training.reference import base_log_probs

_READ = {
    "model_name_or_path", "download_hub", "stage", "fine_tuning", "compute_type", "seed", "batch_size",
    "per_device_eval_batch_size", "max_evaluate_steps", "output_dir", "eval_dataset_path", "eval_dataset_type",
    "columns", "max_seq_len", "packing", "chat_template", "allow_special_tokens_in_text", "max_dropped_fraction",
    "dataloader_num_workers", "cache_data", "data_cache_dir", "loss_type", "beta", "label_smoothing", "normalize_logps",
    "offset_alpha", "simpo_gamma", "dpop_lambda", "pref_loss_ratio", "sft_loss_ratio", "kto_desirable_weight",
    "kto_undesirable_weight", "reference_free", "max_prompt_len", "num_comparisons", "mask_out_eos_token",
    "share_prompt", "lora_path", "group_size", "tensor_parallel_degree", "sequence_parallel", "expert_parallel_degree",
    "use_expert_parallel", "moe_group",
}  # fmt: skip
_NUM_SHOWN = 10  # answers that are printed; all of them are in answers.jsonl


def evaluate(cfg: RunConfig, *, reference: str | None = None) -> dict[str, float]:
    """Measure `cfg.model.model_name_or_path`, with the adapter of lora_path or of a finished run, on
    `eval_dataset_path`; prints the figures and returns them.

    Several ranks share the model as the degrees say, and the rows of the eval set; together they give the same answers.
    `reference` is a model folder with whose predictions the model's are compared (training/fidelity.py).
    """
    place = runtime.rank_place()
    require_ready(cfg, "eval", world=place.world)
    for text in (*cfg.notices, *_unread(cfg)):
        notice(text)
    assert cfg.model.model_name_or_path  # require_ready saw to it
    folder = open_to_answer(locate_model(cfg.model.model_name_or_path, cfg.model.download_hub))
    adapter = adapter_of(cfg)
    _check_kind(cfg, folder, adapter)
    require_alone(folder, adapter=adapter, pack=packing_of(cfg))
    tokenizer = Tokenizer.from_folder(folder.path)
    tokenizer.check_vocab(folder.config.vocab_size)
    layout = layout_of(cfg, place.world, folder.config, verb="eval")
    require_whole_matrices(folder, tensor=layout.tensor)
    mesh = open_mesh(layout, place, config=facts_of(cfg))
    require_same_model(mesh, folder, tokenizer)
    read = first_alone(mesh, "data", lambda: _read_data(cfg, tokenizer))
    data = read or _read_data(cfg, tokenizer)  # the others find it tokenised
    require_same_data(mesh, None, data)
    if not paddle.device.is_compiled_with_cuda():
        first_alone(mesh, "kernels", tier)  # compiled once, and not while others wait in a collective
    if adapter:
        notice(f"measured with the adapter {adapter}")
    elif cfg.model.fine_tuning == "LoRA":
        notice("neither output_dir nor lora_path names an adapter; the base is measured by itself")
    against = reference_of(folder, cfg, reference, mesh=mesh)
    rows = Rows(data, _batch_size(cfg), cfg.train.max_evaluate_steps, mesh)
    kept = kept_of(against, rows) if against else None
    model = load_for_answers(folder.path, adapter=adapter, pack=packing_of(cfg), mesh=mesh)
    metrics = _measured(cfg, model, data, mesh=mesh)
    metrics |= (kept.against(model) if kept else {}) | quantised_figures(folder, model, against)
    judged = _answered(cfg, model, tokenizer, data, folder=folder.path, mesh=mesh)
    metrics |= _of_answers(judged, data.source_names)
    _print_table(metrics)
    for item in judged[:_NUM_SHOWN]:
        asked, reference = item.prompt.messages[-1]["content"], _reference_text(item)
        print(f"\nprompt:    {asked}\nreference: {reference}\nanswer:    {item.text}", flush=True)
    if cfg.train.output_dir and mesh.first:
        _write(Path(cfg.train.output_dir) / "eval", metrics, judged)
    mesh.close()
    return metrics


def _batch_size(cfg: RunConfig) -> int:
    return cfg.train.per_device_eval_batch_size or cfg.train.batch_size


def _read_data(cfg: RunConfig, tokenizer: Tokenizer) -> EvalData:
    with ByteProgress("reading data") as progress:
        data = build_eval_data(
            cfg.data, tokenizer, stage=cfg.model.stage, seed=cfg.train.seed, align=cfg.align, progress=progress
        )
    print(data.summary, flush=True)
    return data


def _check_kind(cfg: RunConfig, folder: Folder, adapter: Path | None) -> None:
    """Refuse a model that the stage has no measure for."""
    stage, is_reward = cfg.model.stage, folder.config.is_reward
    if adapter:
        is_reward = is_reward or AdapterFolder.open(adapter).config.is_reward
    if is_reward and stage != "RM":
        raise ConfigError(f"{folder.path}: is a reward model; it is measured on pairs: set stage: RM.")
    if stage == "RM" and not is_reward:
        raise ConfigError(
            f"{folder.path}: is a language model; stage RM measures a reward model, as `train` with stage: RM makes it."
        )


def _unread(cfg: RunConfig) -> list[str]:
    """One line that names what an eval file sets for nothing. A file that trains sets much that is not for `eval`."""
    names = [
        name for name, key in KEYS.items()
        if cfg.given(name) and key.built and cfg.has_effect(name) and not key.asks_for_nothing(cfg.value(name))
        and name not in _READ and (key.section != "generate" or name == "system_prompt")
    ]  # fmt: skip
    for_training, listed = cfg.data.train_dataset_path, ", ".join(names)
    return [] if for_training or not names else [f"not for `eval`, so without effect: {listed}"]


def _measured(cfg: RunConfig, model: ErnieForCausalLM, data: EvalData, *, mesh: Mesh) -> dict[str, float]:
    """Loss, perplexity and accuracy, and the speed of measuring them."""
    started = time.perf_counter()
    rows, most = _batch_size(cfg), cfg.train.max_evaluate_steps
    if cfg.model.stage in PREFERENCE_STAGES:
        return measure_preferences(_preferring(cfg, model, mesh), model, data, batch_size=rows, max_batches=most)
    metrics = measure(model, data, batch_size=rows, max_batches=most, mesh=mesh)
    return metrics | {"tokens_per_s": metrics["eval_tokens"] / (time.perf_counter() - started)}


def _preferring(cfg: RunConfig, model: ErnieForCausalLM, mesh: Mesh) -> PreferenceObjective:
    """What the stage measures. The reference of a model with adapters is the model without them."""
    stage, keys = cfg.model.stage, cfg.align
    needs_reference = stage == "KTO" or (stage == "DPO" and keys.needs_reference)
    if needs_reference and not adapter_config_of(model):
        raise ConfigError(
            f"stage {stage} compares a model with its reference, and {cfg.model.model_name_or_path} comes without one. "
            "Name an adapter (its base is the reference), or for pairs a loss without a reference (loss_type: simpo); "
            "a run measures its eval set beside its reference while it trains."
        )
    reference = base_log_probs if needs_reference else None
    return preference_objective(stage, keys, LossWeights(ranks=TokenRanks(mesh)), reference=reference, mesh=mesh)


def _answered(
    cfg: RunConfig, model: ErnieForCausalLM, tokenizer: Tokenizer, data: EvalData, *, folder: Path, mesh: Mesh
) -> list[Judged]:
    """The answers to `eval_generate` prompts, each beside its reference."""
    prompts = data.prompts(cfg.generate.eval_generate)
    if not prompts:
        if cfg.generate.eval_generate:
            notice("eval_generate has no effect: the eval set holds no dialogue.")
        return []
    defaults = read_generation_config(folder)
    sampling = Sampling.of(cfg.generate, defaults, seed=cfg.train.seed)
    rows = _batch_size(cfg)
    notice(f"answers to {len(prompts)} prompts, {rows} at a time; {sampling}")
    template = choose_template(tokenizer, cfg.data.chat_template)
    variables = {"enable_thinking": cfg.generate.enable_thinking}
    texts = generate_batch(
        model, tokenizer, prompts, max_new_tokens=cfg.generate.max_new_tokens, template=template, variables=variables,
        sampling=sampling, further_stops=eos_ids(defaults), batch_size=rows, mesh=mesh,
    )  # fmt: skip
    return [
        judge(
            prompt, text, template=template,
            asked=prompt_text(tokenizer, prompt.messages, template=template, tools=prompt.tools, variables=variables),
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]  # fmt: skip


def _of_answers(judged: Sequence[Judged], sources: Sequence[str]) -> dict[str, float]:
    """The figures over all answers, and where they come from several sources those of each."""
    if not judged:
        return {}
    found = figures(judged)
    if len(sources) > 1:
        for source, short in zip(sources, short_names(sources), strict=True):
            own = [item for item in judged if item.prompt.name.rpartition(":")[0] == source]
            found |= {f"{name}/{short}": value for name, value in figures(own).items() if own}
    return found


def _reference_text(item: Judged) -> str:
    reference = item.prompt.reference
    calls = reference.get("tool_calls")
    return json.dumps(calls, ensure_ascii=False) if calls else reference["content"]


def _print_table(metrics: Mapping[str, float]) -> None:
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:,.6f}" if isinstance(value, float) else f"{name:{width}} {value:,}", flush=True)


def _write(folder: Path, metrics: Mapping[str, float], judged: Sequence[Judged]) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics)
    lines = [json.dumps(item.row(), ensure_ascii=False) + "\n" for item in judged]
    atomic_write(folder / "answers.jsonl", "".join(lines).encode())
    print(f"written: {folder / 'metrics.json'}, {folder / 'answers.jsonl'}", flush=True)
