"""The training loop: step, log, evaluate, save, resume, stop. Nothing else.

A step depends on (seed, step) and the model's state only, so a run that was cut anywhere continues bit-equal.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import paddle

from erniekit.base.console import warn
from erniekit.base.errors import TrainingStopped
from erniekit.config.run import RunConfig
from erniekit.data.build import TrainData
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.best import BestModel
from erniekit.training.fp8 import Fp8Training
from erniekit.training.metrics import Reporter
from erniekit.training.optimizer import Optimizer
from erniekit.training.preference import Reference
from erniekit.training.ranks import anybodys
from erniekit.training.replay import StepKeeper
from erniekit.training.router import RouterUpkeep
from erniekit.training.schedule import Schedule
from erniekit.training.state import Checkpoints, Memory
from erniekit.training.step import Objective, StepResult, train_step

_STREAM = 1 << 40  # between the seeds of two data ranks


@dataclass(frozen=True)
class Rhythm:
    """How long a run is and what happens how often; 0 means never."""

    total_steps: int
    batch_size: int
    row_length: int
    seed: int
    eval_every: int = 0
    save_every: int = 0

    @classmethod
    def of(cls, cfg: RunConfig, data: TrainData) -> Rhythm:
        """As the run sets it."""
        train = cfg.train
        total = train.max_steps if train.max_steps > 0 else data.total_steps(train.num_train_epochs)
        eval_every = _every(train.evaluation_strategy, train.eval_steps, data)
        if eval_every and cfg.watch.minimum_eval_times:
            eval_every = min(eval_every, max(total // cfg.watch.minimum_eval_times, 1))
        return cls(
            total_steps=total, batch_size=train.batch_size, row_length=cfg.data.max_seq_len, seed=train.seed,
            eval_every=eval_every, save_every=_every(train.save_strategy, train.save_steps, data),
        )  # fmt: skip


def _every(strategy: str, steps: int, data: TrainData) -> int:
    return {"no": 0, "steps": steps, "epoch": data.steps_per_epoch if strategy == "epoch" else 0}[strategy]


@dataclass
class Run:
    """Everything the loop drives."""

    mesh: Mesh
    model: ErnieForCausalLM
    optimizer: Optimizer
    schedule: Schedule
    data: TrainData
    objective: Objective
    upkeep: RouterUpkeep
    reporter: Reporter
    checkpoints: Checkpoints
    rhythm: Rhythm
    keeper: StepKeeper
    evaluate: Callable[[], dict[str, float]] | None = None  # None: there is no eval set
    before_step: tuple[Callable[[int], None], ...] = ()  # each is called with the 0-based step that is about to begin
    memory: Memory | None = None  # what the objective carries from step to step
    reference: Reference | None = None  # what it is compared with, if it is a preference
    best: BestModel = field(default_factory=BestModel)
    fp8: Fp8Training | None = None

    def progress(self) -> dict[str, Any]:
        """What the run has found out so far, for a checkpoint."""
        health = self.upkeep.health
        return {"best": self.best.state(), "health": health.state() if health else None}

    def other_weights(self) -> AbstractContextManager[None]:
        """To be put around a block within which the model has other weights than before and afterwards."""
        return self.fp8.other_weights() if self.fp8 else nullcontext()

    def resume(self, progress: dict[str, Any]) -> None:
        """Take over what `progress` returned."""
        self.best.load_state(progress.get("best", {}))
        if self.upkeep.health and progress.get("health"):
            self.upkeep.health.load_state(progress["health"])


class AskedToStop(KeyboardInterrupt):
    """All ranks have saved, because the user wanted it so."""


def train_loop(run: Run, *, start_step: int) -> int:
    """Take steps `start_step` + 1 to the last, or to where no evaluation gets better; returns how many were taken in
    all. Raises AskedToStop after saving if the user asked to stop, whichever rank heard it."""
    run.model.train()
    total, done = run.rhythm.total_steps, start_step
    with _stop_request() as asked_to_stop:
        while done < total and not run.best.waited_enough:
            result = _take(run, done)
            done += 1
            health = run.upkeep.health.report(done) if run.upkeep.health else {}
            fp8, modules = run.fp8.report(done) if run.fp8 else ({}, {})
            run.reporter.step(_row(done, run.schedule(done - 1), result) | health | fp8, modules)
            better = False
            if run.evaluate and _due(done, run.rhythm.eval_every, total):
                figures = _evaluate(run, run.evaluate)
                run.reporter.evaluation({"step": done, **figures})
                better = run.best.judge(done, figures) and run.best.keep
            last = done == total or run.best.waited_enough
            saving = run.checkpoints
            asked, writing, failed = anybodys(run.mesh, [asked_to_stop(), saving.writing, saving.failed])
            if failed or not writing:
                saving.wait()
            stopping = asked and not last
            if better or stopping or _due(done, run.rhythm.save_every, done if last else total):
                _save(run, done)
            if stopping:
                run.checkpoints.wait()
                raise AskedToStop
        run.checkpoints.wait()
    return done


def _evaluate(run: Run, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What rank 0 finds, on all ranks: they judge by the same numbers, to the last bit."""
    with run.mesh.pulse.phase("evaluating"):
        figures = evaluate()
        if run.optimizer.averages():
            with run.other_weights(), run.optimizer.averaged():
                figures["ema_eval_loss"] = evaluate()["eval_loss"]
    return run.mesh.words.share("figures", figures)


def _save(run: Run, step: int) -> None:
    best = run.best.step if run.best.keep else 0
    with run.mesh.pulse.phase("saving"):
        run.checkpoints.save(
            run.model, run.optimizer, step=step, progress=run.progress(), memory=run.memory, best=best
        )  # fmt: skip


def _take(run: Run, step: int) -> StepResult:
    with run.mesh.pulse.step(step + 1):
        return _step(run, step)


def _step(run: Run, step: int) -> StepResult:
    data = run.mesh.axis("data")
    # Whatever draws numbers in a step draws them from (seed, step), and data ranks draw others for their rows.
    paddle.seed(run.rhythm.seed * 1_000_003 + step + data.index * _STREAM)
    for prepare in run.before_step:
        prepare(step)
    if run.fp8:
        run.fp8.begin(step, logged=run.reporter.due(step + 1))
    if run.upkeep.health:
        run.upkeep.health.begin(step, last=step + 1 == run.rhythm.total_steps)
    size = run.rhythm.batch_size
    batches = run.data.micro_batches(step, batch_size=size, index=data.index, parts=data.size)

    def keep(loss: float, reason: str) -> None:
        everybodys = run.data.micro_batches(step, batch_size=size)
        with run.mesh.pulse.phase("keeping the step"):
            run.keeper.keep(
                run.model, step=step, reason=reason, loss=loss, batches=everybodys, rows=run.data.rows(step),
                reference=run.reference, scales=run.fp8.scales() if run.fp8 else {},
            )  # fmt: skip

    def before_update(loss: float) -> None:
        if reason := run.keeper.spike(loss):
            keep(loss, reason)

    try:
        result = train_step(
            run.model, run.optimizer, batches=batches, objective=run.objective, upkeep=run.upkeep,
            learning_rate=run.schedule(step), row_length=run.rhythm.row_length, before_update=before_update,
            mesh=run.mesh,
        )  # fmt: skip
    except TrainingStopped as stop:
        why = run.fp8.astray() if run.fp8 else ""
        reason = f"{stop}; {why}" if why else str(stop)
        keep(math.nan, reason)
        saved = run.checkpoints.newest_step()
        kept = f"checkpoint-{saved} stands" if saved else "no checkpoint had been saved yet"
        samples = ", ".join(run.data.sample_names(step)[:8])
        raise TrainingStopped(
            f"step {step + 1}: {reason}. The update was not made; {kept}. Its first samples: {samples}. "
            "Try a lower learning_rate or a longer warm-up, or look at these samples"
            f"{'; compute_type: bf16 shows whether FP8 is the cause' if run.fp8 else ''}."
        ) from None
    if run.fp8:
        run.fp8.after_update()
    run.keeper.add(result.loss)
    return result


def _row(step: int, rate: float, result: StepResult) -> dict[str, Any]:
    return {
        "step": step,
        "loss": result.loss,
        "lr": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": result.tokens / result.seconds,
        "tokens": result.tokens,
        "trained_tokens": result.trained,
        **result.parts,
    }


def _due(step: int, every: int, total: int) -> bool:
    return every > 0 and (step % every == 0 or step == total)


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask once: the step under way is finished and saved. A second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        warn("stopping after this step; the run will be saved. Ctrl-C again stops at once, without saving.")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's signals are not ours
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
