"""Ranks in processes of their own, started in every way that the documentation names: `--nproc`, Paddle's launcher, and
the scripts for ssh and Slurm with stand-ins for ssh, srun and scontrol: two "machines" on this one, a rank on each."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from erniekit.base import runtime
from erniekit.base.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    "erniekit": f'exec {sys.executable} -m erniekit "$@"',
    "ssh": 'while [[ $1 == -* ]]; do shift; done\necho "$1" >>"$SSH_LOG"\nexec bash -c "$2"',
    "scontrol": "echo 127.0.0.1\necho 127.0.0.1",
    "srun": """
        while [[ $1 == -* ]]; do shift; done
        SLURM_NODEID=1 "$@" & other=$!
        code=0
        SLURM_NODEID=0 "$@" || code=$?
        wait "$other" || exit $?
        exit "$code"
    """,
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """shell(words, code=0, NAME=value ...) runs a command with the stand-ins in PATH and returns its stderr."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)

    def run(*words, code=0, **variables):
        path = f"{folder}:{os.environ['PATH']}"
        given = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "SSH_LOG": str(folder / "ssh.log")}
        given |= {"MKL_NUM_THREADS": "1", "MASTER_PORT": str(free_port())} | variables
        done = subprocess.run(
            list(map(str, words)), cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def trained(bench, shell, tmp_path_factory):
    """What two ranks leave that launch_ssh.sh started."""
    out = tmp_path_factory.mktemp("ssh") / "out"
    config = bench.config(out, max_steps=3, save_strategy="no", eval_dataset_path=None)
    shell("bash", "scripts/launch_ssh.sh", "train", config, "--nproc", 1, HOSTS="me@127.0.0.1 127.0.0.1")
    return out


def losses(out):
    rows = map(json.loads, (out / "train_log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_ssh(trained, shell):
    assert len(losses(trained)) == 3
    assert (trained / "model.safetensors").is_file()
    assert "step 3/3" in (trained / "ranks" / "rank-1.log").read_text()
    assert sorted((shell.folder / "ssh.log").read_text().split()) == ["127.0.0.1", "me@127.0.0.1"]


def test_slurm(trained, bench, shell, run, tmp_path):
    config = bench.config(tmp_path / "out", model_name_or_path=trained)
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}
    shell("bash", "scripts/launch_slurm.sh", "eval", config, "--nproc", 1, **variables)
    figures = json.loads((tmp_path / "out" / "eval" / "metrics.json").read_text())
    run("eval", config, f"output_dir={tmp_path / 'alone'}")
    alone = json.loads((tmp_path / "alone" / "eval" / "metrics.json").read_text())
    assert figures["eval_tokens"] == alone["eval_tokens"]
    assert figures["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)


def test_paddles_launcher(trained, bench, shell, tmp_path):
    config = bench.config(tmp_path / "out", max_steps=3, save_strategy="no", eval_dataset_path=None)
    launcher = (sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", 2, "--log_dir", tmp_path / "log")
    shell(*launcher, "-m", "erniekit", "train", config)
    assert losses(tmp_path / "out") == losses(trained)


def test_a_killed_rank_ends_the_job_within_ten_seconds(bench, tmp_path):
    config = bench.config(tmp_path / "out", max_steps=5000, save_steps=2, save_total_limit=2, eval_dataset_path=None)
    words = [sys.executable, "-m", "erniekit", "train", str(config), "--nproc", "2"]
    given = os.environ | {"PYTHONPATH": str(ROOT), "MKL_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=tmp_path, env=given, text=True, **pipes)
    for line in process.stdout:
        if line.startswith("saved"):
            break
    rank_1 = next(number for number in children(process.pid) if b"PADDLE_TRAINER_ID=1\0" in environment(number))
    os.kill(rank_1, 9)
    killed_at = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - killed_at < 10
    assert process.returncode == 137
    said = err[err.index("error:") :]
    assert said.startswith("error: rank 1 of 2 was killed by signal 9 (SIGKILL)")
    assert f"{tmp_path / 'out' / 'ranks' / 'rank-1.log'}" in said
    assert "Traceback" not in err
    assert any((tmp_path / "out").glob("checkpoint-*"))


def children(number):
    text = Path(f"/proc/{number}/task/{number}/children").read_text()
    return [int(word) for word in text.split()]


def environment(number):
    return Path(f"/proc/{number}/environ").read_bytes()


def test_one_node_tries_again_only_where_that_helps(shell, tmp_path):
    """With a stand-in for erniekit that fails until its third call."""
    calls = tmp_path / "calls"
    fake = tmp_path / "bin" / "erniekit"
    fake.parent.mkdir()
    fake.write_text(f'#!/usr/bin/env bash\necho "$@" >>{calls}\n[ "$(wc -l <{calls})" -ge 3 ] || exit "$CODE"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    words = ("bash", "scripts/launch_one_node.sh", "train", "run.yaml", "seed=1")
    err = shell(*words, PATH=path, CODE="1", RETRIES="5", NPROC="4")
    assert calls.read_text().splitlines() == ["train run.yaml seed=1 --nproc 4"] * 3
    assert err.count("after exit code 1") == 2
    calls.unlink()
    shell(*words, PATH=path, CODE="2", RETRIES="5", code=2)
    assert calls.read_text().splitlines() == ["train run.yaml seed=1"]


def test_kubernetes_sets_what_the_launcher_reads():
    service, job = yaml.safe_load_all((ROOT / "scripts" / "launch_kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert set(given) == set(runtime.JOB_VARIABLES)
    assert given["NNODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert given["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["command"][:2] == ["erniekit", "train"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["launch_one_node", "launch_ssh", "launch_slurm"])
def test_scripts_without_words_say_what_they_want(shell, name):
    assert "usage:" in shell("bash", f"scripts/{name}.sh", code=1)
