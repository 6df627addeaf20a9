"""The data of a run, built once: read, tokenised, its order fixed. The rest of the program comes in through this door.

Knows neither the training loop nor who talks to whom. Where several ranks see different rows, each asks for its part of
every micro-batch: the parts of all of them are the rows that one process with the whole batch would see.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from erniekit.config.align import AlignConfig
from erniekit.config.data import DataConfig
from erniekit.data.batch import Batch, Row, make_batch, make_batches
from erniekit.data.cache import Progress
from erniekit.data.chat import Dialogue, Message
from erniekit.data.intake import read_sources, set_aside, summary
from erniekit.data.leaks import find_leaks
from erniekit.data.mismatch import MismatchedStore
from erniekit.data.packing import VERSION as packing_version
from erniekit.data.packing import Rows, one_per_row, pack_best_fit, pack_in_order
from erniekit.data.preferences import Answers
from erniekit.data.sampler import Concat, Interleave, RandomMix, RowOrder
from erniekit.data.sources import RowReport, Source, list_sources, read_samples
from erniekit.data.store import LedgerEntry, SampleStore, write_ledger
from erniekit.data.tokenizer import Tokenizer

__all__ = [
    "EvalData", "LedgerEntry", "Prompt", "TrainData", "build_eval_data", "build_train_data", "leaks", "write_ledger",
]  # fmt: skip

Order = Concat | RandomMix | Interleave


class Prompt(NamedTuple):
    """What to answer: `messages` up to the last query, and the file's own answer, of several the best."""

    messages: list[Message]
    reference: Message
    tools: tuple[Mapping[str, Any], ...]
    name: str


class TrainData:
    """The training data of a run: which rows a step has is a function of seed, step and rows per step only.

    The rows of all epochs follow one another without a gap; a step may begin in one epoch and end in the next, so no
    sample is ever dropped.
    """

    def __init__(
        self, store: SampleStore, *, data: DataConfig, order: Order, rows_per_step: int, pad_id: int, summary: str
    ) -> None:
        self.rows_per_step = rows_per_step
        self.summary = summary
        self.store = store
        self._pad_id = pad_id
        self._max_seq_len = data.max_seq_len
        packing = [packing_version, data.packing, data.greedy_intokens, data.buffer_size]
        settings = [repr(order), data.max_seq_len, packing, rows_per_step]
        self.fingerprint = hashlib.sha256(json.dumps([store.digest(), *settings]).encode()).hexdigest()
        lengths = store.lengths()
        self._rows = RowOrder(lambda epoch: _pack(order.epoch(epoch), lengths, data))

    @property
    def ledger(self) -> list[LedgerEntry]:
        """What did not get in whole, in file order."""
        return self.store.ledger

    @functools.cached_property
    def fill_rate(self) -> float:
        """The share of real tokens in full rows of the first epoch, its last row apart. Packs it whole."""
        lengths = self.store.lengths()
        num_rows = max(self._rows.rows_in_epoch(0) - 1, 1)
        rows = self._rows.rows(0, num_rows)
        return sum(lengths[sample] for row in rows for sample in row.tolist()) / (num_rows * self._max_seq_len)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps that touch the first epoch. Packs it whole: with a large virtual epoch this takes seconds."""
        return self.total_steps(1)

    def total_steps(self, num_epochs: float) -> int:
        """Steps until `num_epochs` epochs were seen; the last step is filled up from the next epoch."""
        return math.ceil(self._rows.rows_in_epochs(num_epochs) / self.rows_per_step)

    @property
    def row_length(self) -> int:
        """Tokens that a row may hold."""
        return self._max_seq_len

    def rows(self, step: int) -> list[Row]:
        """The global batch of a step, counted from 0."""
        samples = self._rows.rows(step * self.rows_per_step, self.rows_per_step)
        return [self.store.row(row) for row in samples]

    def micro_batches(self, step: int, *, batch_size: int, index: int = 0, parts: int = 1) -> list[Batch]:
        """The rows of a step, in order: of every `parts` times `batch_size` of them, part `index`."""
        rows, whole = self.rows(step), parts * batch_size
        assert len(rows) % whole == 0 or parts == 1, f"{len(rows)} rows of a step for {parts} times {batch_size}"
        firsts = range(index * batch_size, len(rows), whole)
        own = [row for first in firsts for row in rows[first : first + batch_size]]
        return list(make_batches(own, batch_size=batch_size, pad_id=self._pad_id, max_seq_len=self._max_seq_len))

    def sample_names(self, step: int) -> list[str]:
        """file:line of the samples of a step, in the order of its rows."""
        return [document.name for row in self.rows(step) for document in row.documents]


class EvalData:
    """The evaluation data: every sample once, in file order."""

    def __init__(
        self,
        store: SampleStore,
        *,
        data: DataConfig,
        sources: Sequence[Source],
        stage: str,
        pad_id: int,
        ledger: Sequence[LedgerEntry],
        summary: str,
    ) -> None:
        self.ledger = list(ledger)
        self.summary = summary
        self.store = store
        self._sources = sources
        self._stage = stage
        self._pad_id = pad_id
        self._max_seq_len = data.max_seq_len
        lengths = store.lengths()
        ends = itertools.accumulate(store.source_sizes, initial=0)
        self._rows = [  # of each source by itself, so that each can be measured by itself
            list(pack_in_order(samples, lengths, row_len=data.max_seq_len) if data.packing else one_per_row(samples))
            for samples in itertools.starmap(range, itertools.pairwise(ends))
        ]

    @property
    def num_rows(self) -> int:
        """Rows of all samples."""
        return sum(map(len, self._rows))

    @property
    def source_names(self) -> tuple[str, ...]:
        """The path of each source."""
        return tuple(map(str, self._sources))

    def batches(
        self, batch_size: int, *, source: int | None = None, index: int = 0, parts: int = 1
    ) -> Iterator[Batch]:  # fmt: skip
        """All rows, or those of one source, `batch_size` at a time; the last batch may be short.

        Of several `parts` this is number `index`: of every `parts` times `batch_size` rows as many as the others have,
        or one less. All parts have equally many batches; where there is no row left for one, it has one that does not
        count.
        """
        picked = self._rows if source is None else [self._rows[source]]
        waiting = itertools.chain.from_iterable(picked)
        while group := list(itertools.islice(waiting, parts * batch_size)):
            least, more = divmod(len(group), parts)
            first = index * least + min(index, more)
            own = group[first : first + least + (index < more)]
            rows = [self.store.row(samples) for samples in own or group[-1:]]
            yield make_batch(rows, pad_id=self._pad_id, max_seq_len=self._max_seq_len, counts=bool(own))

    def prompts(self, num_prompts: int) -> list[Prompt]:
        """What the first dialogues ask for (-1: all of them): their last answer, and each one before it that calls
        functions. Of answers that are compared the best one begins; of those that are judged one by one, the desirable
        ones. None under PT."""
        return list(itertools.islice(self._prompts(), None if num_prompts < 0 else num_prompts))

    def _prompts(self) -> Iterator[Prompt]:
        for number, source in enumerate(self._sources):
            lines = set(self.store.lines(number).tolist())
            for sample in read_samples(source, RowReport(), stage=self._stage):
                if isinstance(sample.content, str):
                    return
                if sample.line not in lines:
                    continue
                name = f"{source}:{sample.line}"
                if isinstance(sample.content, Dialogue):
                    yield from _asked_of(sample.content, name)
                else:
                    yield from _preferred(sample.content, name, stage=self._stage)


def _asked_of(dialogue: Dialogue, name: str) -> Iterator[Prompt]:
    last = len(dialogue.messages) - 1
    for place, message in enumerate(dialogue.messages):
        if place == last or message.get("tool_calls"):
            yield Prompt(list(dialogue.messages[:place]), message, dialogue.tools, name)


def _preferred(content: Answers, name: str, *, stage: str) -> Iterator[Prompt]:
    good = [answer for answer in content.answers if answer.score] if stage == "KTO" else content.answers[:1]
    for answer in good:
        yield Prompt(list(content.prompt), answer.messages[0], content.tools, name)


def build_train_data(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    stage: str,
    seed: int,
    rows_per_step: int,
    align: AlignConfig | None = None,
    progress: Progress | None = None,
) -> TrainData:
    """Read and tokenise the training files. `align` has the keys of the stages that compare answers; `progress` is
    called with the bytes read so far and the bytes in all."""
    sources = _train_sources(data, stage)
    store = read_sources(sources, data, tokenizer, stage=stage, align=align, progress=progress)
    ledger = store.ledger
    if data.validation_split:
        store, _ = set_aside(store, data.validation_split, seed=seed)
    weights = tuple(source.weight for source in sources)
    told = summary(store, ledger)
    if stage == "KTO":
        store = MismatchedStore(store, seed=seed, max_len=data.max_seq_len)
        told += f"\n{store.summary}"
    return TrainData(
        store,
        data=data,
        order=_order(data, store, weights, seed),
        rows_per_step=rows_per_step,
        pad_id=tokenizer.pad_id,
        summary=f"training data: {told}",
    )


def build_eval_data(
    data: DataConfig, tokenizer: Tokenizer, *, stage: str, seed: int | None = None, align: AlignConfig | None = None,
    progress: Progress | None = None,
) -> EvalData:  # fmt: skip
    """Read and tokenise the evaluation files; without any, take what `validation_split` sets aside with this seed."""
    if data.eval_dataset_path or not data.validation_split:
        sources = list_sources(
            data.eval_dataset_path, data.eval_dataset_type, None, stage=stage, key="eval_dataset", columns=data.columns
        )
        store = read_sources(sources, data, tokenizer, stage=stage, align=align, progress=progress)
        ledger = store.ledger
    else:
        assert seed is not None, "a split without the run's seed is another split"
        sources = _train_sources(data, stage)
        store = read_sources(sources, data, tokenizer, stage=stage, align=align, progress=progress)
        _, store = set_aside(store, data.validation_split, seed=seed)
        ledger = []  # it is all in that of the training data
    told = summary(store, ledger)
    if stage == "KTO":
        store = MismatchedStore(store, seed=0, max_len=data.max_seq_len)
        told += f"\n{store.summary}"
    return EvalData(
        store,
        data=data,
        sources=sources,
        stage=stage,
        pad_id=tokenizer.pad_id,
        ledger=ledger,
        summary=f"evaluation data: {told}",
    )


def leaks(train: TrainData, held: EvalData) -> list[str]:
    """What to warn of if evaluation data is also training data, a sentence each."""
    return find_leaks(train.store, held.store)


def _train_sources(data: DataConfig, stage: str) -> list[Source]:
    return list_sources(
        data.train_dataset_path, data.train_dataset_type, data.train_dataset_prob, stage=stage, key="train_dataset",
        columns=data.columns,
    )  # fmt: skip


def _order(data: DataConfig, store: SampleStore, weights: tuple[float, ...], seed: int) -> Order:
    mix = data.mix_strategy or ("random" if len(data.train_dataset_path or ()) > 1 else "concat")
    if mix == "concat":
        return Concat(store.num_samples, seed, data.random_shuffle)
    if mix == "random":
        return RandomMix(store.source_sizes, weights, data.num_samples_each_epoch, seed, data.random_shuffle)
    return Interleave(store.source_sizes, weights, mix == "interleave_over", seed, data.random_shuffle)


def _pack(samples: Iterator[int], lengths: Sequence[int], data: DataConfig) -> Rows:
    if not data.packing:
        return one_per_row(samples)
    if not data.greedy_intokens:
        return pack_in_order(samples, lengths, row_len=data.max_seq_len)
    return pack_best_fit(samples, lengths, row_len=data.max_seq_len, buffer_size=data.buffer_size)
