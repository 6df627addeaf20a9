"""`export`: the model of a run, finished or of one of its checkpoints, in PT (Hugging Face) or -Paddle layout.

What a LoRA run left is merged into its base, in the base's own precision even where the run quantised it, and proved:
token rows go through base + adapter and through the merged folder as written. Several adapters merge into one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from erniekit.base.console import notice, warn
from erniekit.base.errors import ConfigError
from erniekit.base.files import write_json
from erniekit.base.progress import ByteProgress
from erniekit.checkpoint.adapter_folder import AdapterFolder, mark_of
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.chosen import base_of, trained_model
from erniekit.checkpoint.convert import convert, write_converted
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.merge import Merged, Recipe
from erniekit.checkpoint.qat import trained_checkpoint, trained_in_fp8, write_dequantised
from erniekit.checkpoint.save import GB, MERGE_FILE, require_empty
from erniekit.config.readiness import require_ready
from erniekit.config.run import RunConfig

_FORMS = {"pt": "peft", "paddle": "erniekit"}
_NO_WORDS = "token ids at random (the base has no tokenizer)"


@dataclass(frozen=True)
class Several:
    """Adapters to merge by name, each with a weight, instead of the run's own."""

    adapters: tuple[tuple[Path, float], ...]
    method: str = "linear"
    density: float = 0.5


def export(
    cfg: RunConfig, *, to: str = "pt", out: str | Path | None = None, step: int | None = None,
    adapter_only: bool = False, several: Several | None = None,
) -> Path:  # fmt: skip
    """Write what was trained, with tokenizer, config and generation config; returns the new folder.

    `step` takes output_dir/checkpoint-`step` in place of the result: fp32 weights, as a checkpoint holds them.
    `adapter_only` writes the adapter by itself, in PEFT's form (to="pt") or ERNIEKit's; `several` are merged together.
    """
    require_ready(cfg, "export")
    assert cfg.train.output_dir  # require_ready saw to it
    run = Path(cfg.train.output_dir)
    source = run if step is None else run / f"checkpoint-{step}"
    name = "adapter-export" if adapter_only else "export"
    target = Path(out) if out else run / (name if step is None else f"{name}-{step}")
    adapter = source if is_adapter(source) else _lora_path(cfg) if step is None else None
    picked = several or (Several(((adapter, 1.0),)) if adapter else None)
    if picked:
        exported = ", ".join(str(path) for path, _ in picked.adapters)
        require_empty(target)
        base = Folder.open(base_of(picked.adapters[0][0], cfg))
        base.check()
        if adapter_only:
            _write_adapter(base, picked, target, to=to)
        else:
            _merge(cfg, base, picked, target, to=to)
    elif adapter_only:
        raise ConfigError(f"{source} holds no adapter to export; leave --adapter out to export a whole model.")
    elif qat := trained_in_fp8(cfg):
        folder = trained_checkpoint(cfg, step)
        exported = f"the weights that the FP8 codes of {folder.path} stand for"
        with ByteProgress("rounding as in training") as progress:
            write_dequantised(
                target, folder, qat, to=to, max_shard_bytes=cfg.export.max_shard_size * GB, progress=progress
            )  # fmt: skip
    else:
        exported = str(source)
        convert(trained_model(cfg, step=step), target, to=to, max_shard_bytes=cfg.export.max_shard_size * GB)
    print(f"exported {exported} to {target} ({_FORMS[to] if adapter_only else to} layout)", flush=True)
    return target


def _lora_path(cfg: RunConfig) -> Path | None:
    """The adapter that a config which does not train names; one that trains names where its run starts."""
    asked = cfg.lora.lora_path if cfg.model.fine_tuning == "LoRA" and not cfg.data.train_dataset_path else None
    return Path(asked) if asked else None


# ---------------------------------------------------------------------- adapters
def _write_adapter(base: Folder, picked: Several, target: Path, *, to: str) -> None:
    from erniekit.checkpoint.adapter_save import write_adapter

    if len(picked.adapters) > 1:
        raise ConfigError("several adapters become one model, not one adapter; leave --adapter out.")
    adapter = AdapterFolder.open(picked.adapters[0][0])
    fitted = adapter.on(base.disk_config, mtp_layers=base.form.mtp_layers)
    write_adapter(target, fitted, form="peft" if to == "pt" else "erniekit", base=base, dtype=adapter.dtype)


def _merge(cfg: RunConfig, base: Folder, picked: Several, target: Path, *, to: str) -> None:
    """The merged folder with its proof; nothing is left if the proof fails."""
    from erniekit.checkpoint.adapter_io import check_base

    adapters = [AdapterFolder.open(path) for path, _ in picked.adapters]
    for adapter in adapters:
        if adapter.config.is_reward:
            raise ConfigError(
                f"{adapter.path}: its score makes a reward model of the base, and such an adapter is not merged in "
                "this version: `eval` reads it beside its base, --adapter exports it. A whole reward model comes from "
                "a run with fine_tuning: Full."
            )
        check_base(adapter, base)
    recipe = Recipe(tuple(weight for _, weight in picked.adapters), picked.method, picked.density, cfg.train.seed)
    source = Merged(base, [a.on(base.disk_config, mtp_layers=base.form.mtp_layers) for a in adapters], recipe)
    facts = {
        "base": str(base.path), "base_mark": mark_of(base), **asdict(recipe),
        "adapters": [str(adapter.path) for adapter in adapters],
    }  # fmt: skip
    prove = _proof(cfg, source) if cfg.export.merge_proof else None
    if prove is None:
        warn("merge_proof is off: that the merged model is what base and adapter are was not looked at.")

    def last(stage: Path) -> None:
        write_json(stage / MERGE_FILE, {**facts, "proof": prove(stage) if prove else None})

    write_converted(target, base, to=to, source=source, max_shard_bytes=cfg.export.max_shard_size * GB, last=last)


def _proof(cfg: RunConfig, source: Merged) -> Callable[[Path], dict[str, object]]:
    """Ask base and adapter now; the returned function asks the merged folder, compares, and raises if it is too far."""
    from erniekit.adapters.lora import adapters_off
    from erniekit.checkpoint.load import load_for_answers, load_merged
    from erniekit.rollout.merge_proof import TOLERANCES, difference, logits_of, require_close, token_rows

    base, single = source.base, source.recipe == Recipe(seed=source.recipe.seed)
    held, ids = _held_out(cfg, base)
    rows = token_rows(ids)
    if single:
        model = load_for_answers(base.path, adapter=Path(source.adapters[0].name))
        with adapters_off(model):
            alone = logits_of(model, rows)
    else:
        alone = logits_of(load_for_answers(base.path), rows)
        model = load_merged(source)
    expected = logits_of(model, rows)
    del model  # one at a time
    moved = difference(alone, expected)
    dtype = base.config.dtype
    tolerance = TOLERANCES[dtype] if cfg.export.merge_tolerance is None else cfg.export.merge_tolerance

    def prove(stage: Path) -> dict[str, object]:
        found = difference(expected, logits_of(load_for_answers(stage), rows))
        print(f"proof over {found.tokens} tokens of {held}:", flush=True)
        print(f"  base + adapter against the base:   {moved}", flush=True)
        print(f"  merged against base + adapter:     {found}", flush=True)
        require_close(found, tolerance=tolerance, dtype=dtype)
        if found.mean_kl > 0.1 * moved.mean_kl:
            share = found.mean_kl / (moved.mean_kl or 1)
            warn(
                f"rounding to {dtype} moves the model by {share:.0%} of what the adapter does; beside its base the "
                "adapter loses nothing."
            )
        return {"rows": held, "tolerance": tolerance, "merged": found.facts(), "adapter": moved.facts()}

    return prove


def _held_out(cfg: RunConfig, base: Folder) -> tuple[str, Sequence[Sequence[int]]]:
    """What is asked: rows of the run's evaluation data where there is any, else texts of our own."""
    from erniekit.data.build import build_eval_data
    from erniekit.data.tokenizer import MODEL_FILE, Tokenizer
    from erniekit.rollout.merge_proof import MAX_ROWS, MAX_TOKENS, TEXTS

    if not (base.path / MODEL_FILE).is_file():
        ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (MAX_ROWS, MAX_TOKENS))
        return _NO_WORDS, [row.tolist() for row in ids]
    tokenizer = Tokenizer.from_folder(base.path)
    tokenizer.check_vocab(base.config.vocab_size)
    files = cfg.data.eval_dataset_path or []
    if files and all(Path(file).exists() for file in files):
        data = build_eval_data(cfg.data, tokenizer, stage=cfg.model.stage, seed=cfg.train.seed, align=cfg.align)
        picked = [data.store.row([sample]) for sample in range(min(data.store.num_samples, MAX_ROWS))]
        return "the evaluation data", [document.input_ids.tolist() for row in picked for document in row.documents]
    if files:
        notice("the evaluation data is not here; the proof takes texts of its own.")
    return "built-in texts", [tokenizer.encode(text) for text in TEXTS]
