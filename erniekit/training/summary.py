"""From what a run knows (config, log, story, data) to the plain values of its report."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.base.machine import commit, machine, packages
from erniekit.config.run import KEYS, RunConfig
from erniekit.config.values import text_of
from erniekit.data.build import Prompt
from erniekit.data.store import LedgerEntry
from erniekit.training.budget import memory_text
from erniekit.training.charts import Chart, Points, Series, number_text, smoothed
from erniekit.training.lock import LOCK_NAME
from erniekit.training.metrics import Volume, clock
from erniekit.training.report import Answer, Experts, Report, Table, Tile
from erniekit.training.story import Story, canary_problem, now
from erniekit.version import __version__

_NAMED_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "safetensors", "sentencepiece", "datasets", "pyarrow")
_LEDGER_ROWS = 12
_VERBS = {
    "PT": "Pre-training", "SFT": "Supervised fine-tuning", "DPO": "Training on pairs (DPO)",
    "KTO": "Training on judged answers (KTO)", "RM": "Training of a reward model",
}  # fmt: skip
_OWN_CHARTS = ("eval_loss", "ema_eval_loss", "canary_loss")

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """What the data room gives to the page: masked samples as HTML, prompts, summaries, and the ledger."""

    samples: str
    prompts: Sequence[Prompt]
    summaries: Sequence[str]
    ledger: Sequence[LedgerEntry]


def compose(
    cfg: RunConfig, story: Story, rows: Sequence[Row], *, shown: Shown, total_steps: int, expert_layers: Sequence[str]
) -> Report:
    """The report of a finished run."""
    name = cfg.watch.run_name or Path(cfg.train.output_dir or "").name
    verb = _VERBS.get(cfg.model.stage, cfg.model.stage)
    return Report(
        title=name, subtitle=f"{verb} of {cfg.model.model_name_or_path}, ended {now()}",
        tiles=_tiles(rows, story), notes=_notes(story, total_steps), charts=_charts(rows),
        answers=_answers(shown.prompts, story), samples=shown.samples, experts=_experts(rows, expert_layers),
        sources=_sources(rows), guard=_guard(story),
        guard_problem=canary_problem(story, cfg.watch.canary_max_increase),
        data_lines=[line for text in shown.summaries for line in text.splitlines()], ledger=_ledger(shown.ledger),
        settings=_settings(cfg), environment=_environment(story), commands=_commands(cfg),
    )  # fmt: skip


def _points(rows: Sequence[Row], name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if name in row]


def _change(points: Points) -> tuple[str, str]:
    """The last value, and the way it came."""
    return f"{points[-1][1]:.3f}", f"from {points[0][1]:.3f} at step {points[0][0]}" if len(points) > 1 else ""


def _tiles(rows: Sequence[Row], story: Story) -> list[Tile]:
    volume, loss = Volume.of(rows), smoothed(_points(rows, "loss"))
    tiles = [Tile("training loss", *_change(loss))] if loss else []
    if evaluations := _points(rows, "eval_loss"):
        tiles.append(Tile("eval loss", *_change(evaluations)))
    if _points(rows, "accuracy") and (judged := _points(rows, "eval_accuracy")):
        tiles.append(Tile("eval accuracy", *_change(judged)))
    before, after = story.get("canary_before"), story.get("canary_after")
    if before and after:
        tiles.append(Tile("canary loss", f"{after:.3f}", f"{after / before - 1:+.1%} from {before:.3f}"))
    if volume.seconds:
        rate, all_tokens = volume.trained / volume.seconds, f"{volume.tokens / volume.seconds:,.0f} with context"
        tiles.append(Tile("trained tokens/s", number_text(rate), all_tokens))
    tiles.append(Tile("trained tokens", number_text(volume.trained), f"of {volume.tokens:,}"))
    return [*tiles, Tile("steps", f"{volume.steps:,}", f"{clock(volume.seconds)} of stepping")]


def _notes(story: Story, total_steps: int) -> list[str]:
    notes, ended, best = [], story.get("ended_at", total_steps), story.get("best")
    if ended < total_steps:
        notes.append(f"Stopped early after step {ended} of {total_steps}: evaluations got no better.")
    if best and best["step"] and best["step"] != ended:
        notes.append(f"The model is the one of step {best['step']}, {best['metric']} {best['value']:.4f}.")
    if len(story.get("lives")) > 1:
        steps = ", ".join(str(life["step"]) for life in story.get("lives")[1:])
        notes.append(f"The run was interrupted and resumed after step {steps}.")
    if memory := story.get("memory"):
        notes.append(f"{memory_text(**memory)}.".replace("m", "M", 1))
    return notes


def _charts(rows: Sequence[Row]) -> list[Chart]:
    loss, rate = _points(rows, "loss"), _points(rows, "tokens_per_s")
    trained = [
        (row["step"], row["tokens_per_s"] * row["trained_tokens"] / row["tokens"])
        for row in rows
        if row.get("tokens") and "trained_tokens" in row
    ]
    terms = sorted({name for row in rows for name in row if name.endswith("_loss") or name.startswith("mtp_loss")})
    beside = [Chart(name, (Series("last", _points(rows, name)),)) for name in terms if name not in _OWN_CHARTS]
    sources = sorted({name for row in rows for name in row if name.startswith("eval_loss/")})
    return [
        Chart("Training loss", (Series("each step", loss, faint=True), Series("smoothed", smoothed(loss)))),
        Chart("Evaluation loss", (
            Series("last", _points(rows, "eval_loss"), dots=True),
            Series("moving average of the weights", _points(rows, "ema_eval_loss"), dots=True),
        )),
        Chart("Evaluation loss by source", tuple(
            Series(name.removeprefix("eval_loss/"), _points(rows, name), dots=True) for name in sources
        )),
        *_preference_charts(rows),
        Chart("Learning rate", (Series("last", _points(rows, "lr")),)),
        Chart("Gradient norm", (Series("each step", _points(rows, "grad_norm")),), log=True),
        Chart("Throughput", (
            Series("tokens/s", smoothed(rate)), Series("trained tokens/s", smoothed(trained)),
        )),
        *beside,
    ]  # fmt: skip


def _preference_charts(rows: Sequence[Row]) -> list[Chart]:
    """What only preferences have; charts without a point are not drawn."""

    def course(title: str, **names: str) -> Chart:
        series = [Series(label, smoothed(_points(rows, name))) for name, label in names.items()]
        held = [Series(f"{label}, held out", _points(rows, f"eval_{name}"), dots=True) for name, label in names.items()]
        return Chart(title, (*series, *held))

    if not _points(rows, "accuracy"):
        return []
    return [
        course("Accuracy: the better answer is ahead", accuracy="trained on"),
        course("Rewards", rewards_chosen="chosen", rewards_rejected="rejected"),
        course("Margin of the rewards", margin="trained on"),
        course("Log-probabilities of answers", logps_chosen="chosen", logps_rejected="rejected"),
        course("KL to the reference", kl="trained on"),
    ]


def _answers(prompts: Sequence[Prompt], story: Story) -> list[Answer]:
    before, after = story.get("answers_before") or [], story.get("answers_after") or []
    found = []
    for i, prompt in enumerate(prompts[: len(after)]):
        asked = "\n".join(f"{message['role']}: {_said(message)}" for message in prompt.messages)
        found.append(Answer(asked, _said(prompt.reference), before[i] if i < len(before) else "", after[i]))
    return found


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    text = str(message.get("content") or "")
    return f"{text}\n{json.dumps(calls, ensure_ascii=False)}".strip() if calls else text


def _experts(rows: Sequence[Row], layers: Sequence[str]) -> Experts | None:
    last = next((row for row in reversed(rows) if "moe_tokens" in row), None)
    if last is None:
        return None
    figures = {
        "Unused experts": "moe_dead_experts", "Largest load over mean load": "moe_imbalance",
        "Entropy of the routers (1: even)": "moe_entropy", "Drift of the correction biases": "moe_bias_drift",
        "Distance of the routers from orthogonal": "moe_orthogonality",
    }  # fmt: skip
    charts = [Chart(title, (Series("last", _points(rows, name)),)) for title, name in figures.items()]
    counts = last["moe_tokens"]
    findings = [
        f"{layer}: {dead} of {len(line)} experts got no token in the last window."
        for layer, line in zip(layers, counts, strict=True)
        if (dead := sum(count == 0 for count in line))
    ]
    return Experts(layers, counts, charts, findings)


def _sources(rows: Sequence[Row]) -> Table | None:
    names = sorted({name for row in rows for name in row if name.startswith("eval_loss/")})
    if not names:
        return None
    table: list[tuple[str, ...]] = []
    for name in names:
        source, found = name.removeprefix("eval_loss/"), _points(rows, name)
        right = _points(rows, f"eval_accuracy/{source}")[-1:]
        figures = (found[0][1], found[-1][1], min(y for _, y in found), *(y for _, y in right))
        table.append((source, *(f"{figure:.4f}" for figure in figures)))
    head = ("source", "first loss", "last", "best", "last accuracy")
    return Table(head[: max(map(len, table))], table)


def _guard(story: Story) -> Table | None:
    before, after = story.get("canary_before"), story.get("canary_after")
    if before is None or after is None:
        return None
    return Table(
        ("canary loss before", "after", "change"), [(f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}")]
    )


def _ledger(entries: Sequence[LedgerEntry]) -> Table | None:
    counted = Counter((entry.action, entry.reason) for entry in entries)
    first = {(entry.action, entry.reason): entry.name for entry in reversed(entries)}
    return Table(
        ("what happened", "reason", "samples", "the first"),
        [(what, why, f"{n:,}", first[what, why]) for (what, why), n in counted.most_common(_LEDGER_ROWS)],
    )


def _settings(cfg: RunConfig) -> Table:
    rows = [
        (name, text_of(cfg.value(name)), text_of(key.default), cfg.origins[name])
        for name, key in KEYS.items()
        if cfg.given(name) and not key.secret and cfg.value(name) != key.default
    ]
    return Table(("key", "value", "default", "where"), rows)


def _environment(story: Story) -> Table:
    installed, here = packages(), commit()
    rows = [("erniekit", __version__ + (f" (commit {here})" if here else ""))]
    rows += [(name, installed[name]) for name in _NAMED_PACKAGES if name in installed]
    rows += [*machine().items()]
    rows += [("begun" if not life["step"] else f"resumed after step {life['step']}", life["at"])
             for life in story.get("lives")]  # fmt: skip
    return Table(("what", "which"), rows)


def _commands(cfg: RunConfig) -> list[str]:
    out = Path(cfg.train.output_dir or "")
    return [f"erniekit reproduce {shlex.quote(str(out / LOCK_NAME))}", f"erniekit chat {shlex.quote(str(out))}"]
