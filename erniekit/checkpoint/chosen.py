"""Which model or adapter a config means, and which model an adapter stands beside."""

from __future__ import annotations

import re
from pathlib import Path

from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.download import locate_model
from erniekit.config.readiness import require_ready
from erniekit.config.run import RunConfig

_NAME = re.compile(r"checkpoint-(\d+)")


def adapter_of(cfg: RunConfig) -> Path | None:
    """The adapter that a config stands for: what its run left in output_dir, else its lora_path (where a run started
    from, if the config trains). None: it has none."""
    run, asked = cfg.train.output_dir, cfg.lora.lora_path
    left = Path(run) if run and is_adapter(run) else None
    if asked and not cfg.given("fine_tuning"):
        raise ConfigError("lora_path acts with fine_tuning: LoRA only; add it to the file or to the command.")
    if not asked or cfg.model.fine_tuning != "LoRA" or (left and cfg.data.train_dataset_path):
        return left
    return Path(asked)


def base_of(adapter: Path, cfg: RunConfig) -> Path:
    """The model beside which an adapter stands: the config's, else the one that the adapter names."""
    named = cfg.model.model_name_or_path
    if named and Path(named) != adapter:
        return locate_model(named, cfg.model.download_hub)
    base = AdapterFolder.open(adapter).base_name
    if not base or not (Path(base) / "config.json").is_file():
        says = f"names '{base}' as its model, which is not here" if base else "does not say which model it is for"
        raise CheckpointError(f"{adapter}: is an adapter and {says}. Name the model: model_name_or_path=DIR.")
    return Path(base)


def trained_model(cfg: RunConfig, *, step: int | None = None) -> Path:
    """The folder of a run's finished model, or of its checkpoint after `step`; raises ConfigError if absent."""
    require_ready(cfg, "export")
    assert cfg.train.output_dir  # require_ready saw to it
    run = Path(cfg.train.output_dir)
    source = run if step is None else run / f"checkpoint-{step}"
    if is_adapter(source):
        raise ConfigError(f"{source} holds an adapter, not a model; merge it first: erniekit export ...")
    if not (source / "config.json").is_file():
        raise ConfigError(_absent(run, step))
    return source


def numbered(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in the folder of a run that is named like a checkpoint, in order."""
    matches = [(_NAME.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()] if run.is_dir() else []
    return sorted((int(match[1]), path) for match, path in matches if match)


def _absent(run: Path, step: int | None) -> str:
    if not run.is_dir():
        return f"output_dir {run} does not exist: there is nothing to export. Train first."
    steps = [number for number, _ in numbered(run)]
    if not steps:
        return f"output_dir {run} holds no finished model and no checkpoint: there is nothing to export."
    if step is not None:
        return f"output_dir {run} holds no checkpoint-{step}; there are {', '.join(map(str, steps))}."
    return (
        f"output_dir {run} holds no finished model. Finish the run (the same train command resumes it), or export its "
        f"newest checkpoint: erniekit export ... --checkpoint {steps[-1]}"
    )
