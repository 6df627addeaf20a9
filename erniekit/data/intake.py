"""From the files of a config to a store of samples, and what is said about it: how much was read, what was lost.

Rows that cannot be used are dropped and noted; too many of them, or a file without a single usable one, are refused.
Knows nothing of order, rows and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from erniekit.base.errors import DataError, listed
from erniekit.config.align import AlignConfig
from erniekit.config.data import DataConfig
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.data.cache import Progress, default_folder, open_sources
from erniekit.data.chat import NO_ROOM, choose_template
from erniekit.data.preferences import TreeRules
from erniekit.data.sources import Source
from erniekit.data.store import LedgerEntry, SampleStore, SourceStore
from erniekit.data.tokenising import Rules
from erniekit.data.tokenizer import Tokenizer

_NUM_SUMMARISED = 5  # lines of a summary about each kind of loss
_NUM_REFUSED = 20  # lines of an error
_NUM_ALSO = 3  # further samples that a line names


def read_sources(
    sources: Sequence[Source], data: DataConfig, tokenizer: Tokenizer, *, stage: str, align: AlignConfig | None = None,
    progress: Progress | None = None,
) -> SampleStore:  # fmt: skip
    """Tokenise all rows, or take them from where they are kept. Raises DataError if too few of them can be used.

    `align` has the keys of the stages that compare answers; None: as they are by default.
    """
    rules = Rules(
        stage=stage,
        max_seq_len=data.max_seq_len,
        allow_special=data.allow_special_tokens_in_text,
        template=None if stage == "PT" else choose_template(tokenizer, data.chat_template),
        trees=TreeRules.of(align or AlignConfig(), stage) if stage in PREFERENCE_STAGES else None,
    )
    keep_in = Path(data.data_cache_dir) if data.data_cache_dir else default_folder()
    stores = open_sources(
        sources, tokenizer, rules, keep_in=keep_in if data.cache_data else None,
        num_workers=data.dataloader_num_workers, progress=progress,
    )  # fmt: skip
    problems = [why for store in stores if not len(store.index) for why in _nothing_left(store, data.max_seq_len)]
    if not problems:
        problems = _too_many_dropped(stores, data.max_dropped_fraction)
    if problems:
        raise DataError(problems)
    return SampleStore(stores)


def _nothing_left(store: SourceStore, max_seq_len: int) -> list[str]:
    """Why a source has no sample."""
    if not store.num_rows:
        return [f"{store.name}: nothing to train on: the file is empty."]
    if all(entry.reason.startswith(NO_ROOM) for entry in store.ledger):
        return [
            f"max_seq_len: {max_seq_len} is too small for every row of {store.name}: nothing to train is left of the "
            f"first ({store.ledger[0].reason.removeprefix(NO_ROOM)}). Raise max_seq_len."
        ]
    rows = f"all its {store.num_rows} rows were" if store.num_rows > 1 else "its only row was"
    return [f"{store.name}: nothing to train on: {rows} dropped:", *_by_reason(store.ledger, limit=_NUM_REFUSED)]


def _too_many_dropped(stores: Sequence[SourceStore], most: float) -> list[str]:
    dropped = [entry for store in stores for entry in store.ledger if entry.action == "dropped"]
    num_rows = sum(store.num_rows for store in stores)
    if len(dropped) <= most * num_rows:
        return []
    return [
        f"{len(dropped):,} of {num_rows:,} rows ({len(dropped) / num_rows:.2%}) cannot be used, and "
        f"max_dropped_fraction: {most:g} allows fewer. Correct or remove them, or raise max_dropped_fraction to train "
        "without them:",
        *_by_reason(dropped, limit=_NUM_REFUSED),
    ]


def _by_reason(entries: Sequence[LedgerEntry], *, limit: int) -> list[str]:
    """A line for each reason, with the samples that it holds for; the commonest reason first."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.reason, []).append(entry.name)
    lines = []
    for reason, (first, *others) in sorted(names.items(), key=lambda item: -len(item[1])):
        also = f" (also {', '.join(listed(others, limit=_NUM_ALSO))})" if others else ""
        lines.append(f"  {first}: {reason}{also}")
    return listed(lines, limit=limit)


def summary(store: SampleStore, ledger: Sequence[LedgerEntry]) -> str:
    """What was read, and by name what didn't get in whole."""
    files = len(store.source_sizes)
    lines = [
        f"{store.num_samples:,} samples from {files} file{'s' if files > 1 else ''}, {store.num_tokens:,} tokens, "
        f"{store.num_trained:,} of them trained"
    ]
    for action in ("truncated", "split", "dropped"):
        entries = [entry for entry in ledger if entry.action == action]
        if entries:
            lines += [f"{len(entries):,} {action}:", *_by_reason(entries, limit=_NUM_SUMMARISED)]
    unused = {name for source in store.sources for name in source.unused_keys}
    if unused:
        lines.append(f"keys of rows that are not used: {', '.join(sorted(unused))}")
    return "\n".join(lines)


def set_aside(store: SampleStore, share: float, *, seed: int) -> tuple[SampleStore, SampleStore]:
    """(the samples to train on, the samples to evaluate on): of every source a share of its rows, by lot.

    The lot hangs on the content and the seed: rows that say the same lie on the same side, as do answers to the same
    prompt, and rows that are added to a file move few others.
    """
    drawn = []
    for source in store.sources:
        rows = np.unique(source.groups)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        drawn.append(rows[np.argsort(_mixed(rows, seed), kind="stable")[:count]])
    if not any(map(len, drawn)):
        raise DataError(
            f"validation_split: {share:g} sets nothing aside: every file has only one row, or all its rows say the "
            "same. Give eval_dataset_path instead."
        )
    both = [np.isin(source.groups, np.concatenate(drawn)) for source in store.sources]
    for source, is_drawn in zip(store.sources, both, strict=True):
        if is_drawn.all():
            raise DataError(
                f"{source.name}: validation_split: {share:g} leaves nothing to train on, because all its rows say the "
                "same, or the same as rows of other files. Give eval_dataset_path instead."
            )
    kept = SampleStore(store.sources, [np.flatnonzero(~is_drawn) for is_drawn in both])
    return kept, SampleStore(store.sources, [np.flatnonzero(is_drawn) for is_drawn in both])


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Other hashes for every seed: the finaliser of splitmix64."""
    mixed = hashes + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
