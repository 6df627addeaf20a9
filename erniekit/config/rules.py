"""What holds between keys: defaults that depend on another key, contradictions, and what the user should be told.

Judges settings only. Whether files exist or a feature is built is readiness.py's question.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from erniekit.base.errors import did_you_mean
from erniekit.config.data import CHAT_TEMPLATES
from erniekit.config.fp8 import fp8_problems
from erniekit.config.keys import INERT, SPEED, Key
from erniekit.config.layout_rules import contradictions
from erniekit.config.lora_rules import adapters
from erniekit.config.model import QUANTISED
from erniekit.config.preferences import preference_problems
from erniekit.config.run import DEFAULT, KEYS, RunConfig
from erniekit.config.values import text_of


def fill_defaults(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Give the keys that the user left open, and that have no fixed default, their value."""
    if values["mix_strategy"] is None:
        num_sources = len(values["train_dataset_path"] or ())
        values["mix_strategy"] = "random" if num_sources > 1 else "concat"
        origins["mix_strategy"] = f"{DEFAULT} for {num_sources} training files"
    if values["per_device_eval_batch_size"] is None:
        values["per_device_eval_batch_size"] = values["batch_size"]
        origins["per_device_eval_batch_size"] = f"{DEFAULT}: batch_size"
    if values["loss_type"] == "orpo" and origins["sft_loss_ratio"].startswith(DEFAULT):
        values["sft_loss_ratio"] = 1.0
        origins["sft_loss_ratio"] = f"{DEFAULT} for loss_type orpo"
    if values["compute_type"] == "fp8" and values["fp8_recipe"] is None:
        rotated = values["apply_hadamard"] and not origins["apply_hadamard"].startswith(DEFAULT)
        stage = values["stage"]
        values["fp8_recipe"] = "blockwise" if stage == "PT" and not rotated else "qat"
        origins["fp8_recipe"] = f"{DEFAULT} for {'apply_hadamard' if rotated else f'stage {stage}'}"
    moments = "use_lowprecision_moment"
    if (values["compute_type"], values["fp8_recipe"]) == ("fp8", "qat") and origins[moments].startswith(DEFAULT):
        values[moments] = True
        origins[moments] = f"{DEFAULT} for fp8_recipe qat"


def problems(config: RunConfig, failed: Collection[str]) -> list[str]:
    """Every contradiction between keys. Keys in `failed` have no readable value, so nothing is said about them."""
    kinds = (
        _template, _shares, _learning_rate, _schedule_steps, _patterns, _endless, _data_sets, _unjudged, _quantised,
        adapters, preference_problems, fp8_problems, contradictions,
    )  # fmt: skip
    found = [finding for kind in kinds for finding in kind(config)]
    return [text for names, text in found if not set(names) & set(failed)]


_Finding = tuple[tuple[str, ...], str]


def _shares(config: RunConfig) -> Iterator[_Finding]:
    for part in ("train", "eval", "canary"):
        path_name = f"{part}_dataset_path"
        num_files = len(config.value(path_name) or ())
        for name in (f"{part}_dataset_type", f"{part}_dataset_prob"):
            given = config.value(name) if name in KEYS else None
            if given and num_files and len(given) not in (1, num_files):
                yield (name, path_name), (
                    f"{_quote(config, name)} has {len(given)} values and {path_name} ({config.origins[path_name]}) has "
                    f"{num_files}; give one for each file, or one for all"
                )
        shares = config.value(name) if name in KEYS else None
        if shares and (min(shares) < 0 or sum(shares) <= 0):
            yield (name,), f"{_quote(config, name)}: shares may not be negative, and one must be above 0"


def _template(config: RunConfig) -> Iterator[_Finding]:
    name = config.data.chat_template
    if name and name not in CHAT_TEMPLATES and not name.endswith((".jinja", ".jinja2", ".j2")):
        yield ("chat_template",), (
            f"{_quote(config, 'chat_template')} is neither a known format ({', '.join(CHAT_TEMPLATES)}) nor a "
            f".jinja file.{did_you_mean(name, CHAT_TEMPLATES)}"
        )


def _learning_rate(config: RunConfig) -> Iterator[_Finding]:
    for name in ("min_lr", "lr_end"):
        if config.has_effect(name) and config.value(name) > config.optimizer.learning_rate:
            yield (name, "learning_rate"), (
                f"{_quote(config, name)} is above {_quote(config, 'learning_rate')}; lower {name} or raise "
                "learning_rate"
            )


def _schedule_steps(config: RunConfig) -> Iterator[_Finding]:
    last = config.optimizer.decay_steps
    for name in ("warmup_steps", "steady_steps"):
        step = config.value(name)
        if last is not None and step is not None and step >= last and _all_count(config, name, "decay_steps"):
            yield (name, "decay_steps"), (
                f"{_quote(config, name)} leaves no way down to {_quote(config, 'decay_steps')}; decay_steps is the "
                f"step at which the learning rate has come down, so it must be above {name}"
            )


def _all_count(config: RunConfig, *names: str) -> bool:
    return all(config.has_effect(name) for name in names)


def _patterns(config: RunConfig) -> Iterator[_Finding]:
    """Regular expressions that cannot be read, factors that are none, and two ways of saying what is trained alone."""
    optimizer = config.optimizer
    factors = optimizer.lr_multipliers or {}
    for name, patterns in (
        ("freeze", optimizer.freeze), ("train_only", optimizer.train_only), ("lr_multipliers", factors),
    ):  # fmt: skip
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                yield (name,), (
                    f"{name} ({config.origins[name]}): {pattern!r} is no regular expression: {error}. A dot stands for "
                    "any character and .* for any text"
                )
    for pattern, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
            yield ("lr_multipliers",), (
                f"lr_multipliers ({config.origins['lr_multipliers']}): {pattern!r}: {text_of(factor)} is no number "
                "above 0; to train nothing there, use freeze"
            )
    alone = [name for name in ("train_only", "train_emb_only", "train_moe_only") if config.value(name)]
    if len(alone) > 1:
        yield tuple(alone), f"{' and '.join(_quote(config, name) for name in alone)}: only one of them can be"


def _endless(config: RunConfig) -> Iterator[_Finding]:
    drawn = config.data.train_dataset_path and config.data.mix_strategy == "random"
    if drawn and config.train.max_steps <= 0 and not config.given("num_samples_each_epoch"):
        yield ("mix_strategy", "max_steps", "train_dataset_path"), (
            f"{_quote(config, 'mix_strategy')} draws rows without end and {_quote(config, 'max_steps')} sets no end; "
            "set max_steps, or num_samples_each_epoch to say what an epoch is, or mix_strategy=concat to take every "
            "row once"
        )


def _data_sets(config: RunConfig) -> Iterator[_Finding]:
    if config.data.eval_dataset_path and config.data.validation_split:
        yield ("validation_split", "eval_dataset_path"), (
            f"{_quote(config, 'validation_split')} and {_quote(config, 'eval_dataset_path')} both say what to evaluate "
            "on; delete one of them"
        )
    shares = config.data.train_dataset_prob or ()
    if config.data.mix_strategy == "interleave_over" and 0 in shares:
        yield ("mix_strategy", "train_dataset_prob"), (
            f"{_quote(config, 'mix_strategy')} ends an epoch when every file has been seen, and "
            f"{_quote(config, 'train_dataset_prob')} never draws some; leave them out of train_dataset_path"
        )


def _unjudged(config: RunConfig) -> Iterator[_Finding]:
    """What chooses among evaluations needs some."""
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if config.value(name) and config.train.evaluation_strategy == "no":
            yield (name, "evaluation_strategy"), (
                f"{_quote(config, name)} needs evaluations and {_quote(config, 'evaluation_strategy')}; "
                "set evaluation_strategy to steps or epoch"
            )
    if config.watch.canary_max_increase is not None and not config.watch.canary_dataset_path:
        yield ("canary_max_increase", "canary_dataset_path"), (
            f"{_quote(config, 'canary_max_increase')} needs files to measure; set canary_dataset_path"
        )


def _quantised(config: RunConfig) -> Iterator[_Finding]:
    model = config.model
    if model.compute_type in QUANTISED and model.fine_tuning == "Full" and config.data.train_dataset_path:
        yield ("compute_type", "fine_tuning", "train_dataset_path"), (
            f"{_quote(config, 'fine_tuning')} trains the weights that {_quote(config, 'compute_type')} rounds to few "
            "bits; set fine_tuning: LoRA to train adapters on them, or compute_type: bf16"
        )
    if config.precision.group_size == 0 and config.has_effect("group_size"):
        yield ("group_size",), f"{_quote(config, 'group_size')}: a group has 1 input or more, or all of them (-1)"


def _quote(config: RunConfig, name: str) -> str:
    return f"{name}: {text_of(config.value(name))} ({config.origins[name]})"


def notices(config: RunConfig) -> list[str]:
    """What the user should know about how the settings are understood, a line each."""
    kinds = (_beaten, _fine_tuning, _no_evaluation, _not_acted_on, _without_effect)
    return [text for kind in kinds for text in kind(config)]


def _beaten(config: RunConfig) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    if train.max_steps > 0 and config.given("num_train_epochs"):
        yield f"max_steps: {train.max_steps} beats num_train_epochs: {text_of(train.num_train_epochs)}"
    if optimizer.warmup_steps > 0 and optimizer.warmup_ratio > 0:
        yield f"warmup_steps: {optimizer.warmup_steps} beats warmup_ratio: {optimizer.warmup_ratio}"
    if 0 < train.max_steps < optimizer.warmup_steps:
        yield f"warmup_steps: {optimizer.warmup_steps} is longer than the run (max_steps: {train.max_steps})"


def _fine_tuning(config: RunConfig) -> Iterator[str]:
    if config.data.train_dataset_path and not config.given("fine_tuning"):
        yield "fine_tuning is not set: all parameters are trained (Full); ERNIEKit would train LoRA"


def _no_evaluation(config: RunConfig) -> Iterator[str]:
    if config.train.evaluation_strategy != "no" and not config.data.has_eval_data:
        strategy = config.train.evaluation_strategy
        yield f"evaluation_strategy: {strategy} has nothing to evaluate: eval_dataset_path is not set"


def _not_acted_on(config: RunConfig) -> Iterator[str]:
    names = [
        name for name, key in KEYS.items() if key.effect == SPEED and not key.built and _asks(config.value(name), key)
    ]
    if names:
        yield f"accepted and not acted on in this version (speed, memory or layout only): {', '.join(names)}"


def _without_effect(config: RunConfig) -> Iterator[str]:
    names = [name for name, key in KEYS.items() if key.effect == INERT and _asks(config.value(name), key)]
    conditional: dict[str, list[str]] = {}
    for name, key in KEYS.items():
        deciding = config.silenced_by(name)
        if deciding and config.given(name) and not key.asks_for_nothing(config.value(name)):
            because = f"{deciding}: {text_of(config.value(deciding))}"
            conditional.setdefault(because, []).append(name)
    if config.parallel.sequence_parallel and config.parallel.tensor_parallel_degree <= 1:
        degree = config.parallel.tensor_parallel_degree
        conditional.setdefault(f"tensor_parallel_degree: {degree}", []).append("sequence_parallel")
    parts = [", ".join(names)] if names else []
    parts += [f"{', '.join(group)} (with {because})" for because, group in conditional.items()]
    if parts:
        yield f"without effect here: {'; '.join(parts)}"


def _asks(value: Any, key: Key) -> bool:
    return value != key.default and not key.asks_for_nothing(value)
