"""Ranks in processes of their own, started in every way that the documentation names: `--nproc`, Paddle's launcher, and
the scripts for ssh and Slurm with stand-ins for ssh, srun and scontrol: two "machines" on this one, a rank on each."""

import json
import os
import signal
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
    hosts = tmp_path_factory.getbasetemp() / "hosts"
    hosts.write_text("# name, then what others want to know\nme@127.0.0.1 slots=1\n\n127.0.0.1\n")
    shell("bash", "scripts/launch_ssh.sh", "train", config, "--nproc", 1, HOSTFILE=str(hosts))
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


RAISES = """
import os, pathlib, sys, threading, time
def fail(*_, **__):
    raise ZeroDivisionError
def throw(mark):
    while not mark.exists():
        time.sleep(.05)
    sys.modules["erniekit.training.loop"].train_step = fail
if os.environ.get("PADDLE_TRAINER_ID") == "1":
    threading.Thread(target=throw, args=(pathlib.Path(__file__).with_name("throw"),), daemon=True).start()
"""


@pytest.fixture(scope="module")
def job(bench, tmp_path_factory):
    """job(option, ...) starts the same long run of two ranks again, and returns it when it has saved something, with
    the process of rank 1. A file `job.throw` makes the next step of rank 1 raise an exception."""
    folder, started = tmp_path_factory.mktemp("job"), []
    keys = {"max_steps": 5000, "save_steps": 2, "save_total_limit": 2, "eval_dataset_path": None}
    config = bench.config(folder / "out", **keys)
    (folder / "sitecustomize.py").write_text(RAISES)
    given = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "MKL_NUM_THREADS": "1"}

    def start(*options):
        words = [sys.executable, "-m", "erniekit", "train", str(config), "--nproc", "2", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, cwd=folder, env=given, text=True, **pipes)
        started.append(process)
        next(line for line in process.stdout if line.startswith("saved"))
        places = {each: environment(each) for each in children(process.pid)}
        return process, next(each for each, place in places.items() if b"PADDLE_TRAINER_ID=1\0" in place)

    start.out, start.throw, start.log = folder / "out", folder / "throw", folder / "out" / "ranks" / "rank-1.log"
    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process, seconds=10):
    """Exit code and stderr of a job that is to end within the time that a failure may take."""
    since = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - since < seconds
    return process.returncode, err


def test_a_killed_rank_ends_the_job_within_ten_seconds(job):
    process, rank_1 = job()
    os.kill(rank_1, signal.SIGKILL)
    code, err = ended(process)
    said = err[err.index("error:") :]
    assert code == 137
    assert said.startswith("error: rank 1 of 2 was killed by signal 9 (SIGKILL)") and f"{job.log}" in said
    assert "Traceback" not in err
    assert any(job.out.glob("checkpoint-*"))


def test_the_traceback_of_the_rank_that_failed_comes_first(job):
    process, _ = job()
    job.throw.touch()
    code, err = ended(process)
    job.throw.unlink()
    assert code == 1
    said = err[err.index("Traceback") :]
    assert said.count("Traceback (most recent call last)") == 1
    assert said.index("ZeroDivisionError") < said.index("error: ")
    assert said.endswith(f"error: rank 1 of 2 ended with exit code 1. Its log: {job.log}.\n")


def test_a_rank_that_hangs_is_named_within_the_users_patience(job):
    process, rank_1 = job("--patience", "5")
    os.kill(rank_1, signal.SIGSTOP)
    code, err = ended(process, 20)
    assert code == 1
    assert "rank 1 does not answer at all" in err
    assert "error: nothing has happened between ranks for 5 seconds: the others wait for rank 1." in err


def test_asked_to_stop_all_ranks_save(job):
    process, _ = job()
    before = newest(job.out)
    process.send_signal(signal.SIGINT)
    code, err = ended(process)
    assert code == 130
    assert "Traceback" not in err and "run the same command again" in err
    assert newest(job.out) > before


def newest(out):
    return max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*") if path.name[-1].isdigit())


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


def test_a_file_of_machines_that_is_not_there(shell):
    err = shell("bash", "scripts/launch_ssh.sh", "train", "run.yaml", HOSTFILE="nowhere", code=2)
    assert err == "error: HOSTFILE=nowhere cannot be read\n"


@pytest.mark.parametrize("name", ["launch_one_node", "launch_ssh", "launch_slurm"])
def test_scripts_without_words_say_what_they_want(shell, name):
    assert "usage:" in shell("bash", f"scripts/{name}.sh", code=1)
