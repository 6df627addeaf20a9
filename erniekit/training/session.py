"""A training run from its config to the model folder: read, claim the folder, resume, train, finish, tell.

Everything that is the same in every stage. What data means, what is minimised and which figures are measured is the
stage's business (recipes/): it comes in as a `Stage`. Every rank goes through it; what is done once, rank 0 does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from erniekit.base import runtime
from erniekit.base.console import notice, warn
from erniekit.base.errors import TrainingStopped
from erniekit.base.progress import ByteProgress
from erniekit.checkpoint.download import locate_model
from erniekit.checkpoint.folder import Folder
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import layout_of
from erniekit.config.layout_rules import idle
from erniekit.config.run import RunConfig
from erniekit.data.build import EvalData, Prompt, TrainData, build_eval_data, build_train_data, leaks, write_ledger
from erniekit.data.preview import html_samples, sample_views
from erniekit.data.tokenizer import Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.cpu.library import tier
from erniekit.parallel.mesh import Mesh, open_mesh
from erniekit.training import assemble
from erniekit.training.best import BestModel
from erniekit.training.budget import memory_text, run_budget
from erniekit.training.evaluate import measure
from erniekit.training.fp8 import Fp8Training, Together
from erniekit.training.lock import LOCK_NAME, finish_lock, lock_of, write_lock
from erniekit.training.loggers import open_loggers, wanted_services
from erniekit.training.loop import AskedToStop, Rhythm, Run, train_loop
from erniekit.training.memory import MemoryWatch
from erniekit.training.metrics import LOG_NAME, Display, Reporter, Volume, last_figures, read_log, write_figures
from erniekit.training.preference import Reference
from erniekit.training.ranks import facts_of, first_alone, require_same_data, require_same_model
from erniekit.training.replay import StepKeeper
from erniekit.training.report import REPORT_NAME, write_report
from erniekit.training.router import sparse_layers
from erniekit.training.run_folder import CONFIG_FILE, RunFolder, claim_together, identity, require_writable
from erniekit.training.schedule import make_run_schedule
from erniekit.training.state import Checkpoints, Memory, load_memory, load_optimizer, saved_progress
from erniekit.training.step import Objective
from erniekit.training.story import Story, canary_problem, told
from erniekit.training.summary import Shown, compose
from erniekit.training.weights import Weights, weights_of


@dataclass
class TrainResult:
    """What a training run leaves: `metrics` are the last figures, `history` the rows of train_log.jsonl."""

    output_dir: str
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What a run works with, all of it read and checked."""

    cfg: RunConfig
    base: Folder
    arch: ErnieConfig
    tokenizer: Tokenizer
    weights: Weights
    data: TrainData
    eval_data: EvalData | None
    canary: EvalData | None
    rhythm: Rhythm
    mesh: Mesh

    @property
    def eval_rows(self) -> int:
        """Rows of a batch that is only measured."""
        return self.cfg.train.per_device_eval_batch_size or self.cfg.train.batch_size

    def prompts(self) -> list[Prompt]:
        """What the report asks the model."""
        return self.eval_data.prompts(self.cfg.watch.report_samples) if self.eval_data else []

    def canary_loss(self, model: ErnieForCausalLM) -> float | None:
        """The loss on what should not be forgotten; None if nothing was named."""
        if not self.canary:
            return None
        most = self.cfg.train.max_evaluate_steps
        return measure(model, self.canary, batch_size=self.eval_rows, max_batches=most, mesh=self.mesh)["eval_loss"]


@dataclass(frozen=True)
class Course:
    """What a stage brings to the loop. `measure` finds the figures of the evaluation data; the rest is as in
    loop.Run."""

    objective: Objective
    measure: Callable[[ErnieForCausalLM], dict[str, float]]
    before_step: tuple[Callable[[int], None], ...] = ()
    memory: Memory | None = None
    reference: Reference | None = None


class Stage(Protocol):
    """What a kind of training adds to a session."""

    def figures(self, sources: Sequence[str]) -> list[str]:
        """The names of what is measured on evaluation data of these sources."""

    def begin(self, job: Job, model: ErnieForCausalLM, folder: RunFolder) -> Course:
        """Get ready for the steps that are not taken yet; `model` is as it was saved last, or as the base has it."""

    def answers(self, job: Job, model: ErnieForCausalLM) -> list[str]:
        """What the model says to the job's prompts."""


def run_session(cfg: RunConfig, stage: Stage) -> TrainResult:
    """Train `cfg.model.model_name_or_path` on the run's data; resumes by itself.

    Raises ErnieKitError for what the user can mend.
    """
    for text in cfg.notices:
        notice(text)
    assert cfg.model.model_name_or_path and cfg.train.output_dir  # recipes.train saw to it
    require_writable(Path(cfg.train.output_dir))
    wanted_services(cfg.watch.report_to)  # one that is not installed is told now, not after the data was read
    base = Folder.open(locate_model(cfg.model.model_name_or_path, cfg.model.download_hub))
    arch = assemble.architecture(base, cfg)
    assemble.check_names(base, arch, cfg)
    tokenizer = Tokenizer.from_folder(base.path)
    tokenizer.check_vocab(arch.vocab_size)
    mesh = _open_mesh(cfg, arch)
    require_same_model(mesh, base, tokenizer)
    try:
        result = _run(cfg, stage, mesh, base=base, arch=arch, tokenizer=tokenizer)
    except (TrainingStopped, AskedToStop):  # in which all ranks agree; after other errors nobody is waited for
        mesh.close()
        raise
    mesh.close()
    return result


def _open_mesh(cfg: RunConfig, arch: ErnieConfig) -> Mesh:
    place = runtime.rank_place()
    layout = layout_of(cfg, place.world, arch)
    if text := idle(cfg, layout):
        notice(text)
    return open_mesh(layout, place, config=facts_of(cfg))


def _run(
    cfg: RunConfig, stage: Stage, mesh: Mesh, *, base: Folder, arch: ErnieConfig, tokenizer: Tokenizer
) -> TrainResult:
    read = first_alone(mesh, "data", lambda: _read_data(cfg, tokenizer, mesh))
    data, eval_data, canary = read or _read_data(cfg, tokenizer, mesh)  # the others find it tokenised
    require_same_data(mesh, data, eval_data, canary)
    weights = weights_of(cfg, base, arch, mesh)
    job = Job(cfg, base, arch, tokenizer, weights, data, eval_data, canary, Rhythm.of(cfg, data), mesh)
    sources = job.eval_data.source_names if job.eval_data else ()
    best = BestModel.of(cfg, figures=stage.figures(sources), measured=job.eval_data is not None)
    record = identity(cfg, fingerprint=job.data.fingerprint, data_ranks=mesh.layout.data)
    assert cfg.train.output_dir
    output_dir = Path(cfg.train.output_dir)
    folder = claim_together(mesh, output_dir, cfg, record=record, total_steps=job.rhythm.total_steps)
    try:
        if folder.finished:
            return _finished(cfg, folder)
        first_alone(mesh, "what the folder says of the run", lambda: _describe(job, folder, record))
        return _Session(job, stage, folder, record, best).train()
    finally:
        folder.release()


def _describe(job: Job, folder: RunFolder, record: dict[str, Any]) -> None:
    """Write down what the run is made of, before its first step."""
    cfg = job.cfg
    if folder.checkpoint is None:
        folder.mark(record, finished_at=None)
        cfg.write_resolved(folder.path / CONFIG_FILE)
        ledger = [*job.data.ledger, *(job.eval_data.ledger if job.eval_data else ())]
        write_ledger(folder.path / "samples.jsonl", ledger)
    if folder.checkpoint is None or cfg.train.resume_anyway or not (folder.path / LOCK_NAME).is_file():
        ranks = job.mesh.layout.world
        lock = lock_of(cfg, fingerprint=job.data.fingerprint, model=job.base.path, ranks=ranks)
        write_lock(folder.path / LOCK_NAME, lock)


def _read_data(cfg: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> tuple[TrainData, EvalData | None, EvalData | None]:
    rows = cfg.train.batch_size * cfg.train.gradient_accumulation_steps * mesh.layout.data
    stage = cfg.model.stage
    with ByteProgress("reading data") as progress:
        data = build_train_data(
            cfg.data, tokenizer, stage=stage, seed=cfg.train.seed, rows_per_step=rows, align=cfg.align,
            progress=progress,
        )  # fmt: skip
    print(data.summary, flush=True)
    eval_data = canary = None
    if cfg.data.has_eval_data:
        eval_data = build_eval_data(cfg.data, tokenizer, stage=stage, seed=cfg.train.seed, align=cfg.align)
        print(eval_data.summary, flush=True)
        for text in leaks(data, eval_data) if cfg.data.check_leaks and mesh.first else ():
            warn(text)
    if cfg.watch.canary_dataset_path:
        files = dataclasses.replace(
            cfg.data, eval_dataset_path=cfg.watch.canary_dataset_path, eval_dataset_type=cfg.watch.canary_dataset_type
        )
        canary = build_eval_data(files, tokenizer, stage="PT" if stage == "PT" else "SFT")
        print(f"canary: {canary.summary}", flush=True)
    return data, eval_data, canary


def _finished(cfg: RunConfig, folder: RunFolder) -> TrainResult:
    """What a run left that has nothing more to do."""
    notice(
        f"{folder.path}: this run is finished; nothing to do. Raise max_steps to go on, or set "
        "overwrite_output_dir=true to start again."
    )
    if problem := canary_problem(told(folder.path), cfg.watch.canary_max_increase):
        raise TrainingStopped(problem)
    history = read_log(folder.path / LOG_NAME)
    return TrainResult(str(folder.path), last_figures(history), history)


@dataclass(frozen=True)
class _Session:
    """One life of a run in its claimed folder."""

    job: Job
    stage: Stage
    folder: RunFolder
    record: dict[str, Any]
    best: BestModel

    def train(self) -> TrainResult:
        """From the first step that is not taken yet to the result."""
        job, folder, cfg = self.job, self.folder, self.job.cfg
        watch = MemoryWatch()
        store, mesh = job.data.store, job.mesh
        needed = run_budget(
            cfg, job.arch, head_bias=job.base.has_head_bias, lengths=store.lengths(),
            labelled=store.num_trained / max(store.num_tokens, 1), on_gpu=watch.on_gpu,
            cut=Cut.of(mesh.layout, mesh.rank),
        )  # fmt: skip
        print(needed.text, flush=True)
        if mesh.layout.world > 1 and not watch.on_gpu:
            first_alone(mesh, "kernels", tier)  # compiled once, and not while others wait in a collective
        model = job.weights.build(folder.checkpoint)
        fp8 = assemble.assemble_fp8(model, cfg, mesh=mesh)
        mesh.meet("the model is read")
        story = Story(folder.path, start_step=folder.start_step, writes=mesh.first)
        if not folder.start_step:
            story.tell(answers_before=self.stage.answers(job, model), canary_before=job.canary_loss(model))
        run = self._run(model, fp8)
        mesh.meet("ready for steps")
        if job.canary and not folder.start_step:
            run.reporter.canary({"step": 0, "canary_loss": story.get("canary_before")})
        try:
            done = train_loop(run, start_step=folder.start_step)
            self._end_with_the_best(run, done)
            if job.canary:
                story.tell(canary_after=job.canary_loss(model))
                run.reporter.canary({"step": done, "canary_loss": story.get("canary_after")})
        except KeyboardInterrupt:
            notice(f"stopped; run the same command again to go on from {folder.path}.")
            raise
        finally:
            run.reporter.close()
        ranges = run.optimizer.ranges()
        job.weights.save(model, folder.path, final=True, ranges=ranges)
        if run.optimizer.averages():
            with run.optimizer.averaged():
                job.weights.save(model, folder.path / "ema", final=True, ranges=ranges)
        memory = {
            "budget": needed.peak, "kernels": needed.kernels, "tensors": watch.tensors, "process": watch.process
        }  # fmt: skip
        best = run.best.state() if run.best.keep else None
        story.tell(memory=memory, answers_after=self.stage.answers(job, model), ended_at=done, best=best)
        history = run.reporter.history
        layers = list(sparse_layers(model))
        first_alone(mesh, "the end", lambda: self._tell(story, history, memory=memory, expert_layers=layers))
        if problem := canary_problem(story, cfg.watch.canary_max_increase):
            raise TrainingStopped(f"{problem} The trained model is saved all the same, in {folder.path}.")
        return TrainResult(str(folder.path), last_figures(history), history)

    def _run(self, model: ErnieForCausalLM, fp8: Fp8Training | None) -> Run:
        job, folder, cfg = self.job, self.folder, self.job.cfg
        optimizer, first = assemble.assemble_optimizer(model, cfg, mesh=job.mesh), job.mesh.first
        reporter = Reporter(
            folder.path if first else None, total_steps=job.rhythm.total_steps, start_step=folder.start_step,
            loggers=open_loggers(cfg, output_dir=folder.path, start_step=folder.start_step) if first else (),
            display=Display.of(cfg, job.data),
        )  # fmt: skip
        course = self.stage.begin(job, model, folder)
        memory = Together.of(course.memory, fp8.memory if fp8 else None)
        save_exactly = functools.partial(job.weights.save, final=False, ranges=optimizer.ranges())
        losses = job.mesh.words.share("losses", [row["loss"] for row in reporter.history if "loss" in row])
        run = Run(
            mesh=job.mesh, model=model, optimizer=optimizer,
            schedule=make_run_schedule(cfg, job.rhythm.total_steps), data=job.data, objective=course.objective,
            memory=memory, reference=course.reference, reporter=reporter, rhythm=job.rhythm, best=self.best, fp8=fp8,
            upkeep=assemble.router_upkeep(model, cfg, mesh=job.mesh),
            checkpoints=Checkpoints(
                folder.path, writer=job.weights.writer, describe=self.record, keep=cfg.train.save_total_limit or None,
                mesh=job.mesh, background=bool(cfg.train.use_async_save), tell=reporter.saved,
            ),
            before_step=(*assemble.step_hooks(model, cfg), *course.before_step),
            keeper=StepKeeper(folder.path, cfg, save_model=save_exactly, losses=losses, mesh=job.mesh),
            evaluate=(lambda: course.measure(model)) if job.eval_data else None,
        )  # fmt: skip
        if folder.checkpoint:
            load_optimizer(folder.checkpoint, optimizer, model, job.mesh)
            if memory:
                load_memory(folder.checkpoint, memory, model, job.mesh)
            run.resume(saved_progress(folder.checkpoint))
        return run

    def _end_with_the_best(self, run: Run, done: int) -> None:
        """Leave in the model what the run ends with: the last weights, or the best ones if they are asked for."""
        best = run.best
        if done < self.job.rhythm.total_steps:
            notice(f"stopped early after step {done}: {best.waited} evaluations in a row had no better {best.metric}.")
        if best.keep and best.step not in (0, done):
            notice(f"ending with the model of step {best.step}, {best.metric} {best.value:.6f}.")
            with run.other_weights(), run.optimizer.whole_weights():
                self.job.weights.refill(run.model, self.folder.path / f"checkpoint-{best.step}")
            run.mesh.meet("the best model is read")

    def _tell(
        self, story: Story, history: list[dict[str, Any]], *, memory: dict[str, int], expert_layers: Sequence[str]
    ) -> None:
        """Everything that is written and said at the end beside the model."""
        self._write_report(story, history, expert_layers=expert_layers)
        self.folder.mark(self.record, finished_at=self.job.rhythm.total_steps)
        print(Volume.of(history).text)
        print(memory_text(**memory))
        print(f"the trained model is in {self.folder.path} ({self.job.weights.form})", flush=True)

    def _write_report(self, story: Story, history: list[dict[str, Any]], *, expert_layers: Sequence[str]) -> None:
        job, cfg, output_dir = self.job, self.job.cfg, self.folder.path
        try:
            losses = [row["loss"] for row in history if "loss" in row]
            finish_lock(output_dir / LOCK_NAME, cfg, losses=losses, ranks=job.mesh.layout.world)
            if cfg.watch.metrics_output_path:
                write_figures(Path(cfg.watch.metrics_output_path), history)
            shown = Shown(
                html_samples(sample_views(job.data, job.tokenizer, step=0, rows=3)),
                job.prompts(),
                [part.summary for part in (job.data, job.eval_data) if part], job.data.ledger,
            )  # fmt: skip
            write_report(output_dir / REPORT_NAME, compose(
                cfg, story, history, shown=shown, total_steps=job.rhythm.total_steps, expert_layers=expert_layers
            ))  # fmt: skip
        except Exception as error:  # noqa: BLE001 - what is told of a run must not cost the model
            warn(f"{output_dir}: {LOCK_NAME} or {REPORT_NAME} could not be written: {type(error).__name__}: {error}")
