"""Training on preferences: pairs (stage DPO), answers judged one by one (KTO), reward models (RM)."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from erniekit.base.console import notice
from erniekit.config.fp8 import fp8_of
from erniekit.config.run import RunConfig
from erniekit.data.batch import Batch
from erniekit.data.cache import default_folder
from erniekit.data.chat import choose_template
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.rollout.brief import brief_answers
from erniekit.training.assemble import assemble_fp8, loss_weights
from erniekit.training.held_out import held_out, measure_preferences, preference_figures, preferences
from erniekit.training.lock import LOCK_NAME, read_lock
from erniekit.training.preference import PreferenceObjective, Reference, preference_objective
from erniekit.training.reference import Follower, PolicyCopy, Table, base_log_probs, table_name
from erniekit.training.run_folder import RunFolder
from erniekit.training.session import Course, Job, TrainResult, run_session


@dataclass(frozen=True)
class _Memories:
    """The reference's copy and what the objective remembers, as one training.state.Memory."""

    parts: Mapping[str, PolicyCopy | PreferenceObjective]

    def state(self) -> dict[str, paddle.Tensor]:
        """See Memory."""
        return {f"{part}.{name}": t for part, owner in self.parts.items() for name, t in owner.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """See Memory."""
        for part, owner in self.parts.items():
            own = {name.removeprefix(f"{part}."): a for name, a in state.items() if name.startswith(f"{part}.")}
            if own:
                owner.load_state(own)


class PreferenceStage:
    """See training.session.Stage."""

    def __init__(self, cfg: RunConfig) -> None:
        self._stage = cfg.model.stage

    def figures(self, sources: Sequence[str]) -> list[str]:
        """What is measured on held-out preferences; loss, accuracy and margin of each source if there are several."""
        return preference_figures(self._stage, sources)

    def begin(self, job: Job, model: ErnieForCausalLM, folder: RunFolder) -> Course:
        """The objective with its reference, which is computed now if it is a table."""
        keys = job.cfg.align
        copy = PolicyCopy(model, every=keys.ref_model_update_steps)
        reference = _reference(job, model, folder, copy) if keys.compares(self._stage) else None
        weights = loss_weights(job.arch, job.cfg, mesh=job.mesh)
        objective = preference_objective(self._stage, keys, weights, reference=reference, mesh=job.mesh)

        def measured(trained: ErnieForCausalLM) -> dict[str, float]:
            assert job.eval_data
            return measure_preferences(objective, trained, job.eval_data, **_extent(job))

        memory = _Memories({"reference": copy, "objective": objective})
        return Course(objective, measured, (copy.before_step,), memory, reference)

    def answers(self, job: Job, model: ErnieForCausalLM) -> list[str]:
        """What the model says to the first prompts of the evaluation data; a reward model says nothing."""
        if self._stage == "RM":
            return []
        template = choose_template(job.tokenizer, job.cfg.data.chat_template)
        return brief_answers(model, job.tokenizer, job.prompts(), template=template, mesh=job.mesh)


def _extent(job: Job) -> dict[str, int]:
    return {"batch_size": job.eval_rows, "max_batches": job.cfg.train.max_evaluate_steps}


def train_on_preferences(cfg: RunConfig) -> TrainResult:
    """Train as the run says; see `run_session`."""
    return run_session(cfg, PreferenceStage(cfg))


def _reference(job: Job, model: ErnieForCausalLM, folder: RunFolder, copy: PolicyCopy) -> Reference:
    """Where the reference's log-probabilities come from in this run; see training/reference.py."""
    if job.cfg.model.fine_tuning == "LoRA":
        if job.cfg.lora.lora_path and folder.checkpoint is None:
            copy.take()  # the run begins with an adapter: so does the reference
        return Follower(base_log_probs, copy)
    table = Table(_table_path(job, folder))
    every = job.cfg.align.ref_model_update_steps
    if not 0 < every <= folder.start_step:  # later on, the reference is a copy
        _fill(table, job, model, folder)
    return Follower(table, copy)


def _table_path(job: Job, folder: RunFolder) -> Path | None:
    """A file in the folder of tokenised data, named by all that log-probabilities depend on beside the samples."""
    data, model = job.cfg.data, job.cfg.model
    if not data.cache_data:
        return None
    files = read_lock(folder.path / LOCK_NAME)["model"]["files"]
    device, fp8 = paddle.get_device().partition(":")[0], fp8_of(job.cfg)
    name = table_name(files, model.compute_type, fp8.numbers if fp8 else str(model.cpu_bf16_matmul), device)
    return (Path(data.data_cache_dir) if data.data_cache_dir else default_folder()) / name


def _fill(table: Table, job: Job, model: ErnieForCausalLM, folder: RunFolder) -> None:
    """Compute what the steps and evaluations of the run will ask for. A resumed run finds it in the file; if that is
    gone, the base is built once more beside the model, and dropped."""
    base: list[ErnieForCausalLM] = []

    def began_with() -> ErnieForCausalLM:
        if not base:
            notice("the reference: log-probabilities of every answer under the model as it is before training")
            base.append(_begun(job) if folder.checkpoint else model)
            job.mesh.meet("the reference is read")
        return base[0]

    started, steps = time.perf_counter(), range(job.rhythm.total_steps)
    bar = tqdm(steps, "reference", unit="step", leave=False, disable=not sys.stderr.isatty())
    measured = held_out(job.eval_data, **_extent(job), mesh=job.mesh) if job.eval_data else ()
    num = table.fill(itertools.chain(preferences(_unseen(job, bar)), *measured), model=began_with, mesh=job.mesh)
    if num:
        print(f"the reference: {num:,} samples in {time.perf_counter() - started:.1f} s", flush=True)


def _begun(job: Job) -> ErnieForCausalLM:
    """The model as it was when the run began, apart from the one that is trained."""
    model = job.weights.build(None)
    assemble_fp8(model, job.cfg, mesh=job.mesh)
    return model


def _unseen(job: Job, steps: Iterable[int]) -> Iterator[Batch]:
    """The micro-batches of this rank where any rank has a sample that none before them had, until all were seen."""
    data, size = job.mesh.axis("data"), job.rhythm.batch_size
    seen: set[int] = set()
    for step in steps:
        rows = job.data.rows(step)
        own = job.data.micro_batches(step, batch_size=size, index=data.index, parts=data.size)
        for number, batch in enumerate(own):
            whole = rows[number * size * data.size : (number + 1) * size * data.size]
            samples = {document.preference.sample for row in whole for document in row.documents if document.preference}
            if not seen.issuperset(samples):
                seen |= samples
                yield batch
            if len(seen) == job.data.store.num_samples:
                return
