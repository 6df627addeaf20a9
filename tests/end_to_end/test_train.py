"""Training through the command line: what a run leaves, and how it treats its output folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.manifest import check_manifest
from erniekit.ops.wheel import has_bf16_products


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def digests(out: Path, step: int) -> dict[str, str]:
    files = [out / "model.safetensors", *(out / f"checkpoint-{step}").rglob("*.safetensors")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory):
    """A finished run that was never interrupted; not to be changed."""
    from erniekit.cli.main import main

    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(["train", str(bench.config(out, evaluation_strategy="steps", eval_steps=3))]) == 0
    return out


# ---------------------------------------------------------------------- what a run leaves
def test_a_run_leaves_a_model_logs_checkpoints_and_its_config(finished, bench, run):
    assert [row["step"] for row in rows(finished) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s"} <= rows(finished)[0].keys()
    assert [row["step"] for row in rows(finished) if "eval_loss" in row] == [3, 6]
    assert losses(finished)[-1] < losses(finished)[0]
    assert any(path.name.startswith("events") for path in (finished / "runs").iterdir())
    assert sorted(p.name for p in finished.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(check_manifest(path) == [] for path in finished.glob("checkpoint-*"))
    trained, base = Folder.open(finished), Folder.open(bench.model)
    assert (trained.layout, trained.config.dtype) == (base.layout, base.config.dtype) == ("paddle", "bfloat16")
    assert {trained.tag(name) for name in trained.names} == {base.tag(name) for name in base.names}
    run("verify", finished)
    run("verify", finished / "checkpoint-4")
    run("check", finished / "run.yaml")


def test_the_resolved_config_beside_the_run_gives_the_same_run_again(finished, run, tmp_path):
    run("train", finished / "run.yaml", f"output_dir={tmp_path / 'again'}")
    assert digests(tmp_path / "again", 6) == digests(finished, 6)


def test_not_a_terminal_one_line_a_step(bench, run, tmp_path):
    out, _ = run("train", bench.config(tmp_path / "out", max_steps=2))
    assert re.search(r"^step 1/2 loss \d+\.\d{6} ", out, re.M) and re.search(r"^step 2/2 loss ", out, re.M)


def test_save_layout_and_limit(bench, run, tmp_path):
    run("train", bench.config(tmp_path / "out", save_layout="pt", save_total_limit=1))
    assert Folder.open(tmp_path / "out").layout == "pt"
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_a_step_does_not_depend_on_how_the_batch_is_cut(finished, bench, run, tmp_path, batch, accumulation):
    out = tmp_path / "out"
    run("train", bench.config(out, batch_size=batch, gradient_accumulation_steps=accumulation, moe_aux_loss_lambda=0))
    whole = tmp_path / "whole"
    run("train", bench.config(whole, moe_aux_loss_lambda=0))
    assert np.allclose(losses(out), losses(whole), rtol=2e-6)
    assert np.allclose([r["grad_norm"] for r in rows(out)], [r["grad_norm"] for r in rows(whole)], rtol=2e-5)


def test_recomputation_gives_the_same_run(finished, bench, run, tmp_path):
    for granularity in ("full", "full_attn", "core_attn"):
        out = tmp_path / granularity
        run("train", bench.config(out, recompute=True, recompute_granularity=granularity))
        assert digests(out, 6) == digests(finished, 6)


def test_pre_training_on_text(bench, run, tmp_path):
    out = tmp_path / "out"
    text = dict(train_dataset_path=bench.folder / "text.jsonl", train_dataset_type="text")
    run("train", bench.config(out, stage="PT", eval_dataset_path=None, **text))
    assert losses(out)[-1] < losses(out)[0]


def test_auxiliary_terms_are_logged_and_change_only_the_gradient(bench, run, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    run("train", bench.config(plain, max_steps=2, moe_aux_loss_lambda=0))
    terms = dict(moe_aux_loss_lambda=0.1, moe_z_loss_lambda=0.1, moe_orthogonal_loss_lambda=0.1)
    run("train", bench.config(out, max_steps=2, **terms))
    assert {"aux_loss", "z_loss", "orthogonal_loss"} <= rows(out)[0].keys()
    assert losses(out)[0] == losses(plain)[0] and losses(out)[1] != losses(plain)[1]


def test_correction_bias_follows_the_load_and_is_saved(bench, run, tmp_path):
    out = tmp_path / "out"
    run("train", bench.config(out, moe_use_aux_free=True, moe_use_aux_free_update_coef=0.01))
    stored = load_file(out / "model.safetensors")
    biases = [value for name, value in stored.items() if "e_score_correction_bias" in name]
    assert biases and all(np.abs(value).max() > 0 for value in biases)
    assert all(np.allclose(value * 100, np.round(value * 100), atol=1e-3) for value in biases)
    run("train", bench.config(tmp_path / "off", moe_use_aux_free=False))
    off = load_file(tmp_path / "off" / "model.safetensors")
    assert all(not value.any() for name, value in off.items() if "e_score_correction_bias" in name)


def test_multi_token_prediction_is_trained_kept_and_carried(bench, run, tmp_path):
    err = run("train", bench.config(tmp_path / "no", num_nextn_predict_layers=1), code=2)[1]
    assert err.count("mtp_init") == 1  # whatever number of weights are missing
    out = tmp_path / "out"
    run("train", bench.config(out, num_nextn_predict_layers=1, mtp_init="random"))
    assert "mtp_loss_1" in rows(out)[0] and rows(out)[5]["mtp_loss_1"] < rows(out)[0]["mtp_loss_1"]
    first = {name: value for name, value in load_file(out / "model.safetensors").items() if "mtp" in name}
    assert len(first) >= 9
    off = tmp_path / "off"
    run("train", bench.config(off, model_name_or_path=out, num_nextn_predict_layers=0))
    carried = load_file(off / "model.safetensors")
    assert all(np.array_equal(carried[name], value) for name, value in first.items())
    run("verify", off)


# ---------------------------------------------------------------------- whose folder is it
def test_a_finished_run_says_so_and_does_nothing(finished, bench, run):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    _, err = run("train", bench.config(finished, evaluation_strategy="steps", eval_steps=3))
    assert "finished" in err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_another_run_is_refused_then_set_aside_never_deleted(bench, run, tmp_path):
    out = tmp_path / "out"
    run("train", bench.config(out))
    kept = digests(out, 6)
    _, err = run("train", bench.config(out, learning_rate="2e-3"), code=2)
    assert "learning_rate" in err and "0.001" in err and "0.002" in err and "overwrite_output_dir" in err
    run("train", bench.config(out, learning_rate="2e-3", overwrite_output_dir=True))
    assert digests(tmp_path / "out.old-1", 6) == kept and digests(out, 6) != kept
    run("train", bench.config(out, learning_rate="2e-3", overwrite_output_dir=True))
    assert (tmp_path / "out.old-2").is_dir()


def test_an_unfinished_run_of_the_same_config_resumes_despite_overwrite(finished, bench, run, tmp_path):
    out = unfinished(bench, run, tmp_path)
    _, err = run("train", bench.config(out, overwrite_output_dir=True))
    assert "resuming" in err and "checkpoint-4" in err and not (tmp_path / "out.old-1").exists()
    assert digests(out, 6) == digests(finished, 6)


def unfinished(bench, run, tmp_path: Path, **keys: object) -> Path:
    """A run that was cut while it saved its last checkpoint."""
    out = tmp_path / "out"
    run("train", bench.config(out, **keys))
    (out / "model.safetensors").unlink()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished_at": None}))
    state = out / "checkpoint-6" / "training" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    (out / ".checkpoint-8.tmp").mkdir()
    return out


def test_a_broken_checkpoint_is_named_and_passed_over_and_the_resumed_run_is_bit_equal(finished, bench, run, tmp_path):
    out = unfinished(bench, run, tmp_path)
    _, err = run("train", bench.config(out))
    assert "checkpoint-6 is broken" in err and "resuming from" in err and "checkpoint-4" in err
    assert digests(out, 6) == digests(finished, 6)
    assert losses(out) == losses(finished)
    assert not (out / ".checkpoint-8.tmp").exists()


@pytest.mark.parametrize("kernels", ["numpy", "bf16"])
def test_other_kernels_resume_bit_equal_and_stay_near(finished, bench, run, tmp_path, monkeypatch, kernels):
    keys, near = {"cpu_bf16_matmul": True} if kernels == "bf16" else {}, 1e-2 if kernels == "bf16" else 1e-4
    if kernels == "numpy":
        monkeypatch.setenv("ERNIEKIT_NUMPY_OPS", "1")
    elif not has_bf16_products():
        pytest.skip("needs avx512_bf16 or amx_bf16")
    whole, out = tmp_path / "whole", unfinished(bench, run, tmp_path, **keys)
    run("train", bench.config(whole, **keys))
    run("train", bench.config(out, **keys))
    assert digests(out, 6) == digests(whole, 6) != digests(finished, 6)
    assert losses(out) == losses(whole) == pytest.approx(losses(finished), rel=near)


def test_resume_from_a_named_checkpoint(finished, bench, run, tmp_path):
    out = unfinished(bench, run, tmp_path)
    _, err = run("train", bench.config(out), f"resume_from_checkpoint={out / 'checkpoint-2'}")
    assert "checkpoint-2" in err and digests(out, 6) == digests(finished, 6)
    out = unfinished(bench, run, tmp_path / "more") if (tmp_path / "more").mkdir() is None else out
    _, err = run("train", bench.config(out), f"resume_from_checkpoint={out / 'checkpoint-6'}", code=2)
    assert "resume_from_checkpoint" in err and "optimizer.safetensors" in err


def test_resume_with_other_settings_is_listed_and_needs_a_word(bench, run, tmp_path):
    out = unfinished(bench, run, tmp_path)
    _, err = run("train", bench.config(out), "weight_decay=0.5", code=2)
    assert "weight_decay" in err and "resume_anyway" in err
    _, err = run("train", bench.config(out), "weight_decay=0.5", "resume_anyway=true")
    assert "weight_decay" in err and "resuming from" in err


def test_changed_data_is_noticed(bench, run, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_bytes((bench.folder / "train.jsonl").read_bytes())
    config = bench.config(tmp_path / "out", train_dataset_path=data, max_steps=2)
    run("train", config)
    with data.open("a") as file:
        file.write('{"src": ["new"], "tgt": ["row"]}\n')
    _, err = run("train", config, "max_steps=4", code=2)
    assert "training data" in err


def test_a_longer_run_goes_on_from_its_end(bench, run, tmp_path):
    out = tmp_path / "out"
    run("train", bench.config(out, lr_scheduler_type="constant", max_steps=4))
    run("train", bench.config(out, lr_scheduler_type="constant", max_steps=6))
    whole = tmp_path / "whole"
    run("train", bench.config(whole, lr_scheduler_type="constant", max_steps=6))
    assert digests(out, 6) == digests(whole, 6) and losses(out) == losses(whole)


def test_a_folder_that_is_no_run_is_not_touched(bench, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (out / "ranks").mkdir()
    (out / "ranks" / "rank-1.log").write_text("begun")
    _, err = run("train", bench.config(out), code=2)
    assert "thesis.txt" in err and "ranks" not in err
    run("train", bench.config(out, max_steps=1), "overwrite_output_dir=true")
    assert (tmp_path / "out.old-1" / "thesis.txt").read_text() == "mine"
    assert (out / "ranks" / "rank-1.log").read_text() == "begun"  # where a rank of this run writes already


def test_two_processes_cannot_share_a_folder(bench, run, tmp_path):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, err = run("train", bench.config(out), code=2)
    assert "another process" in err


# ---------------------------------------------------------------------- when things go wrong
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(bench, run, tmp_path):
    out = tmp_path / "out"
    config = bench.config(out, learning_rate="1e30", max_grad_norm=0, save_steps=1)
    _, err = run("train", config, code=2)
    assert re.search(r"step \d+: the loss is", err) and "checkpoint-" in err and "train.jsonl:" in err
    last = max(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    assert check_manifest(out / f"checkpoint-{last}") == []
    assert not (out / "model.safetensors").exists()


def test_a_full_disk_leaves_the_last_checkpoint(bench, run, tmp_path, monkeypatch):
    from erniekit.checkpoint import together

    real, count = together.create_safetensors, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(together, "create_safetensors", full)
    out = tmp_path / "out"
    _, err = run("train", bench.config(out), code=2)
    assert "disk is full" in err and "checkpoint-4" in err
    assert [p.name for p in out.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert check_manifest(out / "checkpoint-2") == []


def start(config: Path, **keys: object) -> subprocess.Popen:
    words = [sys.executable, "-u", "-m", "erniekit", "train", str(config), *(f"{k}={v}" for k, v in keys.items())]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root)


def test_ctrl_c_saves_says_how_to_resume_and_the_resumed_run_is_bit_equal(bench, run, tmp_path):
    keys = dict(max_steps=60, save_steps=1000)
    out = tmp_path / "out"
    process = start(bench.config(out, **keys))
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "same command again" in err and "Traceback" not in err
    saved = [int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")]
    assert len(saved) == 1 and 5 <= saved[0] < 60
    run("train", bench.config(out, **keys))
    whole = tmp_path / "whole"
    run("train", bench.config(whole, **keys))
    assert digests(out, 60) == digests(whole, 60)


def test_a_terminal_shows_a_bar_with_loss_speed_and_time_left(bench, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    config, root = bench.config(tmp_path / "out", max_steps=3), Path(__file__).parents[2]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(root)
        os.execv(sys.executable, [sys.executable, "-m", "erniekit", "train", str(config)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the terminal is gone with its process
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = shown.decode()
    assert re.search(r"3/3 \[\d\d:\d\d<00:00, .*loss \d+\.\d{4}, [\d,]+ tok/s\]", text), text[-500:]
    assert "step 1/3 loss" not in text
