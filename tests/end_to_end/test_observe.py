"""What a run shows, keeps and can repeat, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import load_model
from erniekit.checkpoint.manifest import check_manifest, write_manifest
from erniekit.checkpoint.model_io import save_model
from erniekit.recipes.replay import replay
from tests.end_to_end.conftest import dialogue, write_rows

EVALUATING = {"evaluation_strategy": "steps", "eval_steps": 2}


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def values(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows(out) if name in row}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def as_fp32(array: np.ndarray) -> np.ndarray:
    """The numbers of a tensor whose bfloat16 bits are stored as uint16."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def spoil(bench, folder: Path, part: str, value: float) -> Path:
    """A copy of the micro model with one value of a weight replaced, in fp32."""
    model = load_model(bench.model)
    (name,) = [name for name, _ in model.named_parameters() if part in name]
    parameter = dict(model.named_parameters())[name]
    array = parameter.numpy()
    array.reshape(-1)[7] = value
    parameter.set_value(array)
    save_model(model, folder, "pt", dtype="float32", base=Folder.open(bench.model))
    return folder


def unfinish(out: Path, *, last_step: int) -> None:
    """As if the process had died after checkpoint-`last_step`."""
    for path in out.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > last_step:
            shutil.rmtree(path)
    for name in ("model.safetensors", "report.html"):
        (out / name).unlink()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished_at": None}))


# ---------------------------------------------------------------------- the best model, and when to stop
def test_a_run_that_gets_worse_stops_early_and_ends_with_its_best_model_bit_equal_on_resume(bench, run, tmp_path):
    # a warm-up to an absurd rate: a few evaluations get better, then all get worse
    keys = dict(
        **EVALUATING, max_steps=40, learning_rate="0.5", lr_scheduler_type="constant", warmup_steps=1000, save_steps=3,
        save_total_limit=1, load_best_model_at_end="true", early_stopping_patience=2,
    )  # fmt: skip
    out = tmp_path / "out"
    _, err = run("train", bench.config(out, **keys))
    losses = values(out, "eval_loss")
    best, last = min(losses, key=losses.get), max(losses)
    assert best < last < 40 and last == best + 4
    assert f"stopped early after step {last}" in err and f"ending with the model of step {best}" in err
    kept = sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    assert kept == [best, last], "the newest, and the best beyond the limit"
    saved, final = weights(out / f"checkpoint-{best}"), weights(out)
    assert all(np.allclose(as_fp32(final[name]), saved[name], rtol=1e-2, atol=1e-5) for name in final)

    whole = weights(out)
    again = tmp_path / "again"
    run("train", bench.config(again, **keys), "save_total_limit=0")
    unfinish(again, last_step=best + 1)
    run("train", bench.config(again, **keys), "save_total_limit=0")
    assert values(again, "eval_loss") == losses and same(weights(again), whole)


def test_evaluations_can_be_asked_for_by_number(bench, run, tmp_path):
    out = tmp_path / "out"
    run("train", bench.config(out, evaluation_strategy="steps", eval_steps=500, minimum_eval_times=3))
    assert list(values(out, "eval_loss")) == [2, 4, 6]


def test_a_figure_that_is_not_measured_is_named(bench, run, tmp_path):
    keys = dict(**EVALUATING, load_best_model_at_end="true", metric_for_best_model="rouge")
    _, err = run("train", bench.config(tmp_path / "out", **keys), code=2)
    assert "'rouge' is no figure" in err and "eval_perplexity" in err


# ---------------------------------------------------------------------- what is written down
def test_only_the_steps_asked_for_are_told_and_all_are_logged(bench, run, tmp_path):
    out = tmp_path / "out"
    shown, _ = run(
        "train", bench.config(out, logging_steps=4, logging_first_step="true", skip_memory_metrics="false",
                              metrics_output_path=tmp_path / "figures", logging_dir=tmp_path / "board"),
    )  # fmt: skip
    assert re.findall(r"^step (\d)/6 loss", shown, re.M) == ["1", "4", "6"]
    assert list(values(out, "loss")) == [1, 2, 3, 4, 5, 6] and list(values(out, "memory_mb")) == [1, 4, 6]
    figures = json.loads((tmp_path / "figures" / "metrics.json").read_text())
    assert figures["loss"] == values(out, "loss")[6] and figures["step"] == 6
    assert list((tmp_path / "board").glob("events*")) and not (out / "runs").exists()
    trained = sum(values(out, "trained_tokens").values())
    assert f"6 steps, {trained:,} trained tokens of {sum(values(out, 'tokens').values()):,}" in shown
    silent, _ = run("train", bench.config(tmp_path / "silent", logging_strategy="no"))
    assert "step 1/6" not in silent and list(values(tmp_path / "silent", "loss")) == [1, 2, 3, 4, 5, 6]


def test_the_health_of_experts_is_told_and_equal_after_a_resume(bench, run, tmp_path):
    out, keys = tmp_path / "out", dict(moe_health_steps=4, save_steps=3, moe_use_aux_free="true")
    shown, _ = run("train", bench.config(out, **keys))
    counts = values(out, "moe_tokens")
    assert list(counts) == [4, 6] and "experts at step 4: " in shown
    tokens = values(out, "tokens")
    assert [sum(layer) for layer in counts[4]] == [2 * sum(tokens[s] for s in (1, 2, 3, 4))] * 2  # two experts a token
    drifts = values(out, "moe_bias_drift")
    assert 0 < drifts[4] < drifts[6] or drifts[4] == pytest.approx(drifts[6])
    names = {"moe_dead_experts", "moe_entropy", "moe_imbalance", "moe_bias_drift", "moe_orthogonality", "moe_tokens"}
    before = [{name: row[name] for name in names} for row in rows(out) if "moe_tokens" in row]
    unfinish(out, last_step=3)
    run("train", bench.config(out, **keys))
    assert [{name: row[name] for name in names} for row in rows(out) if "moe_tokens" in row] == before
    events = b"".join(path.read_bytes() for path in (out / "runs").glob("events*"))
    assert b"moe/tokens_per_expert" in events and b"moe/moe_entropy" in events


def test_every_source_has_its_own_eval_loss(bench, run, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", [dialogue(n) for n in range(220, 224)])
    out, both = tmp_path / "out", f"{bench.folder / 'eval.jsonl'},{more}"
    shown, _ = run("train", bench.config(out, **EVALUATING, max_steps=2, eval_dataset_path=both))
    (row,) = [row for row in rows(out) if "eval_loss" in row]
    parts, counts = [row["eval_loss/eval"], row["eval_loss/more"]], [12, 4]
    assert row["eval_loss"] == pytest.approx(np.average(parts, weights=counts)) and parts[0] != parts[1]
    assert f"  more: loss {parts[1]:.6f}" in shown


# ---------------------------------------------------------------------- what should not be forgotten
def test_forgetting_is_measured_and_can_fail_a_run_without_losing_it(bench, run, tmp_path):
    canary = write_rows(tmp_path / "canary.jsonl", [{"src": ["天地水"], "tgt": ["zzz qqq xxx"]}] * 3)
    out, keys = tmp_path / "out", dict(canary_dataset_path=canary, learning_rate="2e-2", max_steps=8)
    shown, _ = run("train", bench.config(out, **keys))
    before, after = values(out, "canary_loss").values()
    assert list(values(out, "canary_loss")) == [0, 8] and f"canary at step 8: loss {after:.6f}" in shown
    assert f"{before:.4f}" in (out / "report.html").read_text()
    strict = tmp_path / "strict"
    assert after > before
    gated = bench.config(strict, canary_max_increase=(after / before - 1) / 2, **keys)
    for _ in ("the run", "a look at the finished run"):
        _, err = run("train", gated, code=2)
        assert "forgetting" in err and f"from {before:.4f} to {after:.4f}" in err
    assert same(weights(strict), weights(out)) and (strict / "report.html").is_file()


# ---------------------------------------------------------------------- the report
def test_the_report_needs_nothing_from_elsewhere_and_survives_an_interruption(bench, run, tmp_path):
    out, keys = tmp_path / "out", dict(**EVALUATING, report_samples=2, run_name="Fräulein <b>")
    run("train", bench.config(out, **keys))
    whole = (out / "report.html").read_text()
    unfinish(out, last_step=2)
    (out / "run.lock.yaml").unlink()
    run("train", bench.config(out, **keys))
    assert yaml.safe_load((out / "run.lock.yaml").read_text())["losses"] == list(values(out, "loss").values())
    page = (out / "report.html").read_text()
    for text in (whole, page):
        assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:|//|file:)""", text)
        assert "Fräulein &lt;b&gt;" in text and "<b>" not in text.split("<title>")[1].split("</title>")[0]
        for title in ("Course of the training", "Answers before and after", "Experts", "What the model was shown",
                      "Settings", "Surroundings", "Again"):  # fmt: skip
            assert f"<h2>{title}</h2>" in text
        assert text.count("<article class=answer>") == 2 and text.count("<polyline") >= 8
    assert "interrupted and resumed after step 2" in page and "interrupted" not in whole
    said = re.compile(r"<h3>before</h3><p>(.*?)</p>", re.S)
    assert said.findall(page) == said.findall(whole), "the answers before training are those of the first life"


def test_a_report_that_fails_costs_nothing_else(bench, run, tmp_path, monkeypatch):
    monkeypatch.setattr("erniekit.training.session.compose", lambda *_, **__: 1 / 0)
    _, err = run("train", bench.config(tmp_path / "out", max_steps=1))
    assert "run.lock.yaml or report.html could not be written: ZeroDivisionError" in err and weights(tmp_path / "out")


# ---------------------------------------------------------------------- repeating
@pytest.fixture(scope="module")
def locked(bench, tmp_path_factory):
    from erniekit.cli.main import main
    folder = tmp_path_factory.mktemp("locked")
    data = folder / "train.jsonl"
    data.write_bytes((bench.folder / "train.jsonl").read_bytes())
    write_rows(folder / "other.jsonl", [{"src": ["x"], "tgt": ["y"]}])
    assert main(["train", str(bench.config(folder / "out", max_steps=3, train_dataset_path=data))]) == 0
    return folder


def test_a_run_is_repeated_from_its_lock(locked, run, tmp_path):
    lock = yaml.safe_load((locked / "out" / "run.lock.yaml").read_text())
    assert lock["losses"] == list(values(locked / "out", "loss").values()) and lock["packages"]["numpy"]
    assert str(locked / "train.jsonl") in lock["data"]["files"] and len(lock["model"]["files"]) >= 3
    out, _ = run("reproduce", locked / "out" / "run.lock.yaml", "--out", tmp_path / "again")
    assert "the losses of all 3 steps are bit-equal" in out
    assert same(weights(tmp_path / "again"), weights(locked / "out"))


@pytest.mark.parametrize(("factor", "code"), [(1 + 1e-5, 0), (1.01, 2)])
def test_losses_that_differ_are_judged_by_the_bound(locked, run, tmp_path, factor, code):
    lock = yaml.safe_load((locked / "out" / "run.lock.yaml").read_text())
    lock["losses"][1] *= factor
    lock["packages"]["numpy"] = "0.1"
    changed = tmp_path / "run.lock.yaml"
    changed.write_text(yaml.safe_dump(lock))
    out, err = run("reproduce", changed, "--out", tmp_path / "again", code=code)
    assert "numpy 0.1 -> " in err
    assert ("not reproduced: a loss differs by 9.90e-03" in err) if code else ("differ by at most 1.00e-05" in out)


def test_other_data_is_refused_before_anything_is_run(locked, run, tmp_path):
    lock = yaml.safe_load((locked / "out" / "run.lock.yaml").read_text())
    lock["data"]["files"] |= {str(locked / "other.jsonl"): "0" * 64, str(locked / "gone.jsonl"): "0" * 64}
    lock["model"]["files"]["config.json"] = "0" * 64
    (tmp_path / "run.lock.yaml").write_text(yaml.safe_dump(lock))
    _, err = run("reproduce", tmp_path, code=2)
    assert "other.jsonl: its content is another" in err and "gone.jsonl: is not here" in err
    assert "config.json: its content is another" in err
    assert not Path(f"{locked / 'out'}-reproduced").exists()


def test_what_is_no_lock_is_refused(run, tmp_path):
    (tmp_path / "run.lock.yaml").write_text("a: 1\n")
    assert "is no lock file" in run("reproduce", tmp_path / "run.lock.yaml", code=2)[1]
    assert "cannot be read" in run("reproduce", tmp_path / "nowhere.yaml", code=2)[1]
    assert "is not a number" in run("reproduce", tmp_path / "run.lock.yaml", "--bound", "x", code=2)[1]


# ---------------------------------------------------------------------- looking into a step
@pytest.mark.parametrize(
    ("part", "value", "layer"),
    [
        ("layers.1.self_attn.o_proj.weight", np.nan, "model.layers.1.self_attn.o_proj, forward"),
        ("layers.2.mlp.gate.weight", np.inf, "model.layers.2.mlp.gate, forward"),
    ],
)
def test_a_step_that_is_not_finite_is_kept_and_its_layer_named(bench, run, tmp_path, part, value, layer):
    model = spoil(bench, tmp_path / "model", part, value)
    out = tmp_path / "out"
    _, err = run("train", bench.config(out, model_name_or_path=model), code=2)
    folder = out / "replay" / "step-1"
    assert f"erniekit replay {folder}" in err and check_manifest(folder) == []
    run("verify", folder)
    shown, _ = run("replay", folder)
    assert re.search(rf"{re.escape(part)}: 1 of [\d,]+ values are not finite", shown)
    assert f"The first value that is not finite arises in {layer}, micro-batch 0" in shown
    assert "train.jsonl:" in shown and "around it: " in shown


def test_a_spike_is_kept_with_the_weights_before_it_and_training_goes_on(bench, run, tmp_path):
    # a rate that blows the model up after some quiet steps
    keys = dict(max_steps=14, warmup_steps=14, learning_rate="3", lr_scheduler_type="constant", spike_factor=1.2)
    out = tmp_path / "out"
    _, err = run("train", bench.config(out, **keys, save_steps=1))
    steps = sorted(int(path.name.split("-")[1]) for path in (out / "replay").glob("step-*"))
    assert 1 <= len(steps) <= 2 and "1.2 times the median" in err and list(values(out, "loss")) == [*range(1, 15)]
    first = out / "replay" / f"step-{steps[0]}"
    assert same(weights(first), weights(out / f"checkpoint-{steps[0] - 1}")), "the weights before the update"
    shown, _ = run("replay", first)
    found = re.search(r"its loss: ([\d.]+)", shown)
    assert float(found[1]) == pytest.approx(values(out, "loss")[steps[0]], rel=1e-5)
    assert "The largest activations are in " in shown and "all weights are finite" in shown


def test_the_largest_activations_are_found(bench, run, tmp_path):
    model = spoil(bench, tmp_path / "model", "layers.1.self_attn.o_proj.weight", np.nan)
    run("train", bench.config(tmp_path / "out", model_name_or_path=model), code=2)
    folder = tmp_path / "out" / "replay" / "step-1"
    stored = weights(folder)
    (name,) = [name for name in stored if "embed_tokens" in name]
    stored = {n: np.nan_to_num(value) * np.float32(1e4 if n == name else 1) for n, value in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    found = replay(folder)
    assert found.finite and found.layer == "model.embed_tokens"


def test_what_was_not_kept_is_refused(bench, run, tmp_path):
    run("train", bench.config(tmp_path / "out", max_steps=1))
    _, err = run("replay", tmp_path / "out", code=2)
    assert "is no kept step" in err and "output_dir/replay/step-N" in err
