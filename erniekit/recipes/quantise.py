"""`export --quantize`: a trained model, or any folder, in few bits, as a folder for inference.

Weights stream from where they are; an adapter is merged on the way. Nothing is proved as a whole merge is: the report
beside the weights says how far each is from what it was, and `eval` measures the model.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.console import notice
from erniekit.base.errors import ConfigError
from erniekit.base.progress import ByteProgress
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.chosen import adapter_of, base_of, trained_model
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.merge import Merged
from erniekit.checkpoint.qat import trained_checkpoint, trained_in_fp8, trained_scales
from erniekit.checkpoint.quantise import Made, Statistics, write_quantised
from erniekit.checkpoint.quantised import Scheme, format_of
from erniekit.checkpoint.save import GB
from erniekit.checkpoint.source import Source
from erniekit.config.readiness import require_ready
from erniekit.config.run import RunConfig

CALIBRATION_TOKENS = 4096
_ROW = 512  # tokens that are computed together
_WEIGHTS = (".safetensors", ".pdparams")


@dataclass(frozen=True)
class Settings:
    """What follows --quantize."""

    kind: str
    group_size: int | None = None
    int4_layers: int | None = None
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = CALIBRATION_TOKENS
    search: str | None = None


def quantise(
    cfg: RunConfig, settings: Settings, *, folder: Path | None = None, out: Path | None = None, step: int | None = None
) -> Path:
    """Write the model of a run, or of `folder`, in few bits; returns the new folder."""
    format_of(settings.kind)  # a word that is not known is told before anything is looked for
    if settings.calibration_tokens < 1:
        raise ConfigError(f"--calibration-tokens {settings.calibration_tokens}: at least 1.")
    qat = trained_in_fp8(cfg) if folder is None and settings.kind == "fp8" and not settings.group_size else None
    base: Folder
    source: Source
    if qat:
        base = trained_checkpoint(cfg, step)
        source, name = base, str(base.path)
    else:
        base, source, name = _model(cfg, folder, step)
    base.check()
    for text in base.notices:
        notice(text)
    scheme = Scheme.new(
        settings.kind, base.disk_config, group_size=settings.group_size, int4_layers=settings.int4_layers,
        search=settings.search,
    )  # fmt: skip
    scheme = scheme.as_trained(rotated=qat.rotate) if qat else scheme
    target = out or _default_target(cfg, folder, step, settings.kind)
    started, calibrating = time.monotonic(), 0.0

    def statistics() -> Statistics:
        nonlocal calibrating
        begun = time.monotonic()
        found = trained_scales(base) if qat else _statistics(cfg, base, source, scheme, settings)
        calibrating = time.monotonic() - begun
        return found

    with ByteProgress(f"quantising to {settings.kind}") as progress:
        made = write_quantised(
            target, base, scheme, source=source, identity=_identity(base, source, cfg, settings), progress=progress,
            statistics=statistics, max_shard_bytes=cfg.export.max_shard_size * GB,
        )  # fmt: skip
    _tell(made, name, target, seconds=time.monotonic() - started - calibrating, calibrating=calibrating)
    return target


def _model(cfg: RunConfig, folder: Path | None, step: int | None) -> tuple[Folder, Source, str]:
    """The folder whose form is kept, where its weights come from, and its name."""
    if folder is not None:
        opened = Folder.open(folder)
        return opened, opened, str(folder)
    require_ready(cfg, "export")
    adapter = None
    if step is None:
        adapter = adapter_of(cfg)
    elif cfg.train.output_dir and is_adapter(Path(cfg.train.output_dir) / f"checkpoint-{step}"):
        adapter = Path(cfg.train.output_dir) / f"checkpoint-{step}"
    if adapter is None:
        opened = Folder.open(trained_model(cfg, step=step))
        return opened, opened, str(opened.path)
    from erniekit.checkpoint.adapter_io import check_base

    found = AdapterFolder.open(adapter)
    if found.config.is_reward:
        raise ConfigError(f"{adapter}: its score makes a reward model of the base, and such an adapter is not merged.")
    base = Folder.open(base_of(adapter, cfg))
    check_base(found, base)
    fitted = found.on(base.disk_config, mtp_layers=base.form.mtp_layers)
    return base, Merged(base, [fitted]), f"{base.path} with {adapter}"


def _default_target(cfg: RunConfig, folder: Path | None, step: int | None, kind: str) -> Path:
    if folder is not None:
        return folder.parent / f"{folder.name}-{kind}" if folder.name else Path(f"{folder.resolve()}-{kind}")
    if not cfg.train.output_dir:
        raise ConfigError("output_dir is not set; say where to write with --out DIR.")
    return Path(cfg.train.output_dir) / (f"export-{kind}" if step is None else f"export-{step}-{kind}")


def _identity(base: Folder, source: Source, cfg: RunConfig, settings: Settings) -> dict[str, Any]:
    """What makes this export another one than one that was interrupted."""
    adapters = [Path(adapter.name) for adapter in source.adapters] if isinstance(source, Merged) else []
    parts = [path for folder in (base.path, *adapters) for path in sorted(folder.iterdir())]
    files = [path for path in parts if path.is_file() and (path.suffix in _WEIGHTS or path.name == "config.json")]
    texts = settings.calibration or tuple(cfg.data.train_dataset_path or ())
    files += [Path(text) for text in texts if Path(text).is_file()]
    read = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "read": read, "texts": texts, "tokens": settings.calibration_tokens, "seed": cfg.train.seed,
        "search": settings.search,
    }  # fmt: skip


# ---------------------------------------------------------------------- calibration
def _statistics(
    cfg: RunConfig, base: Folder, source: Source, scheme: Scheme, settings: Settings
) -> Statistics:  # fmt: skip
    """What goes through the model, if the format asks for it."""
    kind = settings.kind
    if not (scheme.needs_text or scheme.wants_text):
        if settings.calibration:
            notice(f"{kind} takes nothing from text; --calibration is not used.")
        return Statistics()
    if not (settings.calibration or cfg.data.train_dataset_path):
        if scheme.needs_text:
            raise ConfigError(
                f"--quantize {kind} fixes the scales of inputs, and what goes into a layer depends on text: name some "
                "with --calibration FILE (a text file, or rows as for training), or train_dataset_path in the config."
            )
        notice(f"without --calibration FILE the search for {kind} codes takes all inputs for equally important.")
        return Statistics()
    from erniekit.rollout.calibration import calibrate

    rows = _rows(cfg, base, settings)
    with ByteProgress("calibrating", unit=" layers") as progress:
        return calibrate(base, source, rows, progress=progress)


def _rows(cfg: RunConfig, base: Folder, settings: Settings) -> list[np.ndarray]:
    """Token ids of samples drawn at random, as many tokens as are asked for."""
    from erniekit.data.intake import read_sources
    from erniekit.data.sources import list_sources
    from erniekit.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(base.path)
    tokenizer.check_vocab(base.config.vocab_size)
    data, given = cfg.data, list(settings.calibration)
    paths, kinds, stage = data.train_dataset_path, data.train_dataset_type, cfg.model.stage
    if given:
        paths, kinds, stage = given, None, "PT" if all(map(_is_text, given)) else "SFT"
    sources = list_sources(
        paths, kinds, None, stage=stage, key="--calibration" if given else "train_dataset", columns=data.columns
    )  # fmt: skip
    with ByteProgress("reading text") as progress:
        store = read_sources(sources, data, tokenizer, stage=stage, align=cfg.align, progress=progress)
    wanted, found = settings.calibration_tokens, 0
    rows: list[np.ndarray] = []
    for sample in np.random.default_rng(cfg.train.seed).permutation(store.num_samples).tolist():
        ids = np.asarray(store.row([sample]).documents[0].input_ids, np.int64)
        for start in range(0, len(ids), _ROW):
            row = ids[start : start + _ROW][: wanted - found]
            rows += [row] if len(row) else []
            found += len(row)
    if found < wanted:
        raise ConfigError(
            f"calibration: {', '.join(map(str, paths or ()))} has {found:,} tokens, and {wanted:,} are needed. Give "
            f"more text with --calibration FILE, or ask for fewer: --calibration-tokens {found}."
        )
    return rows


def _is_text(path: str) -> bool:
    """Whether a file holds plain text: a .txt file, or rows with a `text`."""
    if path.endswith(".txt"):
        return True
    try:
        with open(path, "rb") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return False  # who reads it says why
    return isinstance(row, dict) and "text" in row


# ---------------------------------------------------------------------- what is said
def _tell(made: Made, name: str, target: Path, *, seconds: float, calibrating: float) -> None:
    report = made.report
    rate = made.num_bytes / max(seconds, 1e-9) / 1e6
    lines = [
        f"exported {name} to {target} ({report['format']})",
        f"  {report['bytes'] / 1e6:,.1f} MB, {report['bits_per_weight']:.2f} bits a weight "
        f"({report['bits_per_quantised_weight']:.2f} where quantised), relative error {report['relative_error']:.4f}",
        f"  {len(report['tensors'])} weights quantised in {seconds:.1f} s, {rate:,.0f} MB/s of bf16",
    ]
    if report["calibration_tokens"]:
        lines.append(f"  calibrated over {report['calibration_tokens']:,} tokens in {calibrating:.1f} s")
    print("\n".join(lines), flush=True)
