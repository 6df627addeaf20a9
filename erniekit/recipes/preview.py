"""`preview`: the first training samples as tokens with their part in the loss, in the terminal or as a page."""

from __future__ import annotations

from pathlib import Path

from erniekit.base.console import notice, warn
from erniekit.base.errors import ConfigError, listed
from erniekit.base.files import atomic_write
from erniekit.base.progress import ByteProgress
from erniekit.checkpoint.download import locate_model
from erniekit.config.layout_rules import degrees_of
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.readiness import require_ready
from erniekit.config.run import KEYS, RunConfig
from erniekit.data.build import TrainData, build_eval_data, build_train_data, leaks
from erniekit.data.preview import sample_views, text_samples
from erniekit.data.preview_page import html_page
from erniekit.data.store import worst_first
from erniekit.data.tokenizer import Tokenizer

_NUM_ENTRIES = 20  # of the ledger that are printed


def preview(
    cfg: RunConfig, *, step: int | None = None, rows: int = 3, html: str | None = None, ranks: int = 1,
    color: bool = False,
) -> None:  # fmt: skip
    """Show `rows` rows from `step` on, and name the samples of that step if it is given; write a page to `html`. A step
    has the rows of all `ranks` that the run will be."""
    require_ready(cfg, "preview")
    if KEYS["stage"].lacks(cfg.model.stage) and cfg.model.stage not in PREFERENCE_STAGES:
        raise ConfigError(f"stage: {cfg.model.stage} is not built in this version; preview shows rows of text.")
    if (step or 0) < 0 or rows < 1:
        raise ConfigError("--step counts from 0, and --rows must be at least 1.")
    for text in cfg.notices:
        notice(text)
    data, warnings, tokenizer = _read(cfg, ranks=ranks)
    views = sample_views(data, tokenizer, step=step or 0, rows=rows)
    if html is not None:
        page = html_page(data, views, title=str(cfg.path or "a config"), step=step or 0, warnings=warnings)
        atomic_write(html, page.encode())
        print(f"the page is in {html}")
        return
    print(
        f"rows of the first epoch: {data.fill_rate:.2%} full (the last one apart), {data.steps_per_epoch:,} steps of "
        f"{data.rows_per_step} rows"
    )
    print(f"\n{text_samples(views, color=color)}")
    if step is not None:
        print(f"\nsamples of step {step}:")
        for number, row in enumerate(data.rows(step)):
            print(f"  row {number}: {', '.join(document.name for document in row.documents)}")
    if data.ledger:
        entries = (f"  {entry.name}: {entry.action}: {entry.reason}" for entry in worst_first(data.ledger))
        print("\n".join(["", "ledger:", *listed(entries, limit=_NUM_ENTRIES)]))


def _read(cfg: RunConfig, *, ranks: int) -> tuple[TrainData, list[str], Tokenizer]:
    """The training data as `train` reads it, and what it would warn of."""
    assert cfg.model.model_name_or_path  # require_ready saw to it
    tokenizer = Tokenizer.from_folder(Path(locate_model(cfg.model.model_name_or_path, cfg.model.download_hub)))
    stage, seed = cfg.model.stage, cfg.train.seed
    sharing = max(ranks // degrees_of(cfg).tensor, 1)  # ranks with rows of their own
    num_rows = cfg.train.batch_size * cfg.train.gradient_accumulation_steps * sharing
    with ByteProgress("reading data") as progress:
        data = build_train_data(
            cfg.data, tokenizer, stage=stage, seed=seed, rows_per_step=num_rows, align=cfg.align, progress=progress
        )
    print(data.summary)
    warnings = []
    if cfg.data.has_eval_data and cfg.data.check_leaks:
        warnings = leaks(data, build_eval_data(cfg.data, tokenizer, stage=stage, seed=seed, align=cfg.align))
    for text in warnings:
        warn(text)
    return data, warnings, tokenizer
