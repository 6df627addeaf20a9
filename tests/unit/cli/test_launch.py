"""How many ranks, which environment, what is refused before any of them starts. Nothing here starts one."""

import os
import socket
from pathlib import Path

import pytest

from erniekit.base import runtime
from erniekit.base.errors import ConfigError, MeshError
from erniekit.base.runtime import Place
from erniekit.checkpoint.create import create
from erniekit.cli import launch
from erniekit.cli import main as command
from erniekit.cli.launch import Job

CONFIG = "model_name_or_path: nowhere\n"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*runtime.JOB_VARIABLES, "PADDLE_TRAINERS_NUM", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What `erniekit` would start: started("train", "--nproc", "2") returns the ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "run.yaml").write_text(CONFIG)
    found = []

    def remember(ranks, **further):
        found[:] = ranks
        return 7

    def start(verb, *words):
        assert command.main([verb, "run.yaml", *words]) == 7
        return found

    monkeypatch.setattr(launch, "supervise", remember)
    monkeypatch.setattr("erniekit.config.readiness.require_ready", lambda *_, **__: None)
    return start


def test_ranks_get_the_words_without_the_launchers(started):
    ranks = started("train", "--nproc", "2", "seed=3", "--patience=9")
    assert [rank.words[1:] for rank in ranks] == [["-m", "erniekit", "train", "run.yaml", "seed=3"]] * 2
    ranks = started("export", "--to", "paddle", "--nproc=3")
    assert [rank.words[3:] for rank in ranks] == [["export", "run.yaml", "--to", "paddle"]] * 3


def test_ranks_measure_a_folder(started, tmp_path, monkeypatch):
    """Which the launcher takes for a model, as `eval` on one rank does, and not for a file."""
    (tmp_path / "run.yaml").unlink()
    (tmp_path / "run.yaml").mkdir()
    seen = []
    monkeypatch.setattr("erniekit.config.readiness.require_ready", lambda config, *_, **__: seen.append(config.model))
    ranks = started("eval", "--nproc", "2")
    assert [rank.words[3:] for rank in ranks] == [["eval", "run.yaml"]] * 2
    assert [model.model_name_or_path for model in seen] == ["run.yaml"]


def test_the_place_of_every_rank(started):
    ranks = started("train", "--nproc", "2")
    zero, one = (rank.environment for rank in ranks)
    assert [each["PADDLE_TRAINER_ID"] for each in (zero, one)] == ["0", "1"]
    assert {each["PADDLE_TRAINERS_NUM"] for each in (zero, one)} == {"2"}
    assert one["PADDLE_LOCAL_RANK"] == one["PADDLE_RANK_IN_NODE"] == "1"
    assert zero["PADDLE_MASTER"] == one["PADDLE_MASTER"]
    assert one["PADDLE_TRAINER_ENDPOINTS"].split(",")[1] == one["PADDLE_CURRENT_ENDPOINT"]
    assert one["PADDLE_DISTRI_BACKEND"] == "gloo"
    assert one["PADDLE_LOCAL_SIZE"] == "2"  # by which the ranks divide the cores


def test_rank_0_has_the_terminal_and_the_others_log_in_output_dir(started, tmp_path):
    logs = [rank.log for rank in started("train", "--nproc", "2", "output_dir=out")]
    assert logs == [None, Path("out/ranks/rank-1.log")]
    log = started("eval", "--nproc", "2")[1].log
    assert log.name == "rank-1.log" and log.parent.is_dir()  # though the job is over


def test_gpus(started, monkeypatch):
    monkeypatch.setattr(launch, "_gpus", lambda: ["0", "1", "2"])
    ranks = started("train")
    assert [rank.environment["FLAGS_selected_gpus"] for rank in ranks] == ["0", "1", "2"]
    assert all("PADDLE_DISTRI_BACKEND" not in rank.environment for rank in ranks)


def test_one_rank_is_the_process_itself(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    ran = []
    monkeypatch.setattr("erniekit.cli.runs.train", ran.append)
    assert command.main(["train", "run.yaml"]) == command.main(["train", "run.yaml", "--nproc", "1"]) == 0
    assert len(ran) == 2


def test_a_rank_starts_none(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    placed = {"PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ID": "1", "PADDLE_MASTER": "127.0.0.1:1"}
    for name, value in placed.items():
        monkeypatch.setenv(name, value)
    ran = []
    monkeypatch.setattr("erniekit.cli.runs.train", ran.append)
    assert command.main(["train", "run.yaml"]) == 0
    assert len(ran) == 1
    assert command.main(["train", "run.yaml", "--nproc", "2"]) == 2
    assert "one rank of several already" in capsys.readouterr().err


def test_a_place_in_the_words_of_torchrun(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "70"}
    with monkeypatch.context() as patch:
        patch.setattr("os.environ", os.environ | given | {"MASTER_ADDR": "one"})
        assert runtime.rank_place() == Place(3, 4, "one:70")
        assert {"FLAGS_selected_gpus": "1", "PADDLE_LOCAL_SIZE": "2"}.items() <= os.environ.items()
        assert "MASTER_ADDR" not in os.environ  # Paddle would open a store there
        assert command.main(["train", "run.yaml", "--nproc", "2"]) == 2
        assert "3 of 4 by its environment" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("os.environ", os.environ | given | {"MASTER_ADDR": "one", "TORCHELASTIC_USE_AGENT_STORE": "True"})
        assert runtime.rank_place().master == "one:71"  # torchrun itself listens at 70
    with monkeypatch.context() as patch:
        patch.setattr("os.environ", os.environ | given | {"NNODES": "2"})
        assert runtime.rank_place() == Place()  # machines, each with a launcher of ours
    with monkeypatch.context() as patch:
        patch.setattr("os.environ", os.environ | given | {"MASTER_ADDR": "", "MASTER_PORT": ""})
        with pytest.raises(MeshError, match="give this process no place"):
            runtime.rank_place()


def test_ranks_divide_the_cores(monkeypatch):
    monkeypatch.setattr(runtime, "num_cores", lambda: 12)
    for ranks, threads in (("", "12"), ("4", "3"), ("99", "1")):
        monkeypatch.setenv("PADDLE_LOCAL_SIZE", ranks)
        assert runtime._wanted()["MKL_NUM_THREADS"] == threads


def test_logs_go_where_erniekits_variable_says(started, monkeypatch, tmp_path):
    monkeypatch.setenv("ERNIEKIT_DIST_LOG", str(tmp_path / "elsewhere"))
    assert started("train", "--nproc", "2", "output_dir=out")[1].log == tmp_path / "elsewhere" / "rank-1.log"


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """A config whose files are there: a model of 4 heads."""
    monkeypatch.chdir(tmp_path)
    create("micro-dense", tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: model\ntrain_dataset_path: train.jsonl\noutput_dir: out\neval_dataset_path: train.jsonl\n"
    )
    monkeypatch.setattr(launch, "supervise", lambda *_, **__: 7)


def test_a_model_that_the_degrees_do_not_divide_is_refused_before_any_rank(ready, capsys):
    assert command.main(["train", "run.yaml", "--nproc", "3", "tensor_parallel_degree=3"]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "3 devices cannot share evenly the model's" in err and "degrees that fit" in err
    assert command.main(["train", "run.yaml", "--nproc", "2", "tensor_parallel_degree=2"]) == 7
    assert command.main(["eval", "run.yaml", "--nproc", "3", "tensor_parallel_degree=3"]) == 2


@pytest.mark.parametrize("gpus", [1, 3])
def test_too_few_gpus(ready, monkeypatch, capsys, gpus):
    monkeypatch.setattr(launch, "_gpus", lambda: [str(number) for number in range(gpus)])
    assert command.main(["train", "run.yaml", "tensor_parallel_degree=4"]) == 2
    err = capsys.readouterr().err
    assert f"needs 4 devices, and this machine shows {gpus}. Start the command on {-(-4 // gpus)} like it" in err
    assert "or set tensor_parallel_degree=1" in err


@pytest.mark.parametrize(
    ("variables", "nproc", "gpus", "words"),
    [
        ({}, 0, (), ["--nproc 0"]),
        ({}, 3, ("0", "1"), ["--nproc 3", "2 GPUs"]),
        ({"NNODES": "two"}, 1, (), ["NNODES=two"]),
        ({"NNODES": "2"}, 1, (), ["MASTER_ADDR is missing"]),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, 1, (), ["NODE_RANK=2", "0 to 1"]),
        ({"MASTER_PORT": "65536"}, 2, (), ["MASTER_PORT=65536", "65535"]),
    ],
)
def test_refused_all_at_once(variables, nproc, gpus, words):
    with pytest.raises(MeshError) as caught:
        Job(variables, nproc=nproc, gpus=gpus)
    for word in words:
        assert word in str(caught.value)


def test_ranks_of_several_machines():
    job = Job({"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "12"}, nproc=4, gpus=())
    assert (job.world, [job.rank(local) for local in range(4)]) == (12, [4, 5, 6, 7])


def test_a_port_that_is_taken(started, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert command.main(["train", "run.yaml", "--nproc", "2"]) == 2
    assert f"MASTER_PORT={port} cannot be had" in capsys.readouterr().err


def test_a_config_that_every_rank_would_refuse_is_refused_once(started, capsys):
    assert command.main(["train", "run.yaml", "--nproc", "2", "no_such_key=1"]) == 2
    assert capsys.readouterr().err.count("no_such_key") == 1


def test_an_unreadable_number():
    with pytest.raises(ConfigError, match="--nproc: 'two'"):
        from erniekit.cli.arguments import split
        from erniekit.cli.verbs import VERBS

        split(VERBS["train"], ["run.yaml", "--nproc", "two"]).number("nproc")
