"""What `check` lists and what a verb refuses."""

import json

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.families import family
from erniekit.config.load import load_config
from erniekit.config.parallel import UNBUILT_DEGREES
from erniekit.config.readiness import (
    absent_files,
    fp8_device,
    not_built,
    not_checked_here,
    require_built,
    require_ready,
)


def refused(judge, config, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        judge(config, *arguments, **options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "PPO"), ("stage", "vl-sft"), ("stage", "GRPO"), ("compute_type", "fp16"),
        ("optim", "sgd"), ("optim", "adafactor"),
        ("ignore_load_lr_and_optim", True), ("use_cls", False),
        ("ignore_data_skip", True), ("expert_max_capacity", 128),
        ("continue_training", False), ("skip_data_intervals", [[1, 2]]),
    ],
)  # fmt: skip
def test_what_changes_results_and_is_not_built(key, value):
    config = load_config({key: value, "train_dataset_path": "a,b", "max_steps": 1})
    (line,) = not_built(config)
    assert line.startswith(f"argument: {key}: ")
    assert "not built" in line
    assert refused(require_built, config) == [line]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_parallel_degree", 1), ("pipeline_parallel_degree", -1), ("expert_parallel_degree", 0),
        ("sequence_parallel", True), ("sharding", "stage1"), ("tensorwise_offload_optimizer", True),
        ("recompute", True), ("layerwise_lr_decay_bound", 1.0), ("hidden_dropout_prob", 0),
        ("attention_probs_dropout_prob", "0.0"), ("freeze_config", ""), ("moe_group", "mp"),
        ("amp_custom_white_list", "a,b"), ("use_lowprecision_moment", False),
        ("train_emb_only", 0), ("moe_gate", "topk"),
        ("temperature", 0), ("temperature", None), ("beta", 0.3),
        ("lora_rank", 32), ("use_cls", True),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_or_only_for_speed(key, value):
    config = load_config({key: value})
    assert not_built(config) == []
    require_built(config)


def test_a_degree_is_judged_where_the_ranks_are():
    config = load_config({"tensor_parallel_degree": 8, "sharding_parallel_degree": 2, "sharding": "stage1"})
    assert not_built(config) == []
    assert not_checked_here(config) == [
        "argument: tensor_parallel_degree: 8 needs 8 devices.",
        "argument: sharding_parallel_degree: 2 needs 2 devices.",
        "devices in all: 16 at least (tensor_parallel_degree 8 x 2 with other rows), 2 machines of 8; any multiple, "
        "to see more rows in a step.",
    ]
    require_built(config)
    degrees = [line for line in refused(require_ready, config) if "_degree" in line]
    assert len(degrees) == 1 and degrees[0].endswith(
        "--nproc 16; or set tensor_parallel_degree=1, sharding_parallel_degree=1"
    )


@pytest.mark.parametrize("name", UNBUILT_DEGREES)
def test_a_degree_that_is_not_built(name):
    config = load_config({name: 2})
    (line,) = not_built(config)
    assert line.startswith(f"argument: {name}: 2 needs ") and line.endswith(f"not built in this version. Set {name}=1.")
    assert refused(require_built, config) == [line]


def test_degrees_of_a_verb_that_runs_on_ranks(tmp_path):
    (tmp_path / "there").mkdir()
    files = dict.fromkeys(("model_name_or_path", "train_dataset_path", "output_dir"), tmp_path / "there")
    config = load_config({"tensor_parallel_degree": 2, "mix_strategy": "concat", **files})
    require_ready(config, "train", world=2)
    require_ready(config, "train", world=4)
    require_ready(config, "export")
    for world, words in ((1, "--nproc 2"), (3, "start 2 or 4")):
        (line,) = refused(require_ready, config, "train", world=world)
        assert words in line


def test_degrees_that_do_not_fit_a_model_that_is_here(tmp_path):
    files = dict.fromkeys(("model_name_or_path", "train_dataset_path", "output_dir"), tmp_path)
    config = load_config({"tensor_parallel_degree": 3, "mix_strategy": "concat", **files})
    (tmp_path / "config.json").write_text(json.dumps(family("micro-moe").to_dict("pt")))
    (line,) = refused(require_ready, config, world=3)
    assert "tensor_parallel_degree: 3" in line and "attention heads" in line
    (tmp_path / "config.json").write_text("{")
    require_ready(config, world=3)  # what is wrong with the folder is said by who opens it


def test_details_of_what_is_not_built_are_not_listed_apart():
    keys = {
        "stage": "VL-SFT", "compute_type": "fp16",
        "freeze_config": "freeze_vision",
    }  # fmt: skip
    assert [line.split(": ")[1] for line in not_built(load_config(keys))] == ["stage", "compute_type"]


def test_everything_at_once():
    config = load_config({"stage": "PPO", "model_name_or_path": "nowhere", "pipeline_parallel_degree": 2})
    lines = refused(require_ready, config)
    assert len(lines) == 5
    for line, part in zip(lines, ("stage", "pipeline", "train_dataset_path", "output_dir", "nowhere"), strict=True):
        assert part in line


def test_each_verb_judges_what_it_reads():
    config = load_config({"compute_type": "fp16", "mergekit_task_config": "x", "tensor_parallel_degree": 2})
    assert [line.split(": ")[1] for line in refused(require_built, config, "chat")] == ["compute_type"]
    assert "mergekit_task_config" not in str(refused(require_built, config, "train"))
    require_built(load_config({"tensor_parallel_degree": 2, "ignore_load_lr_and_optim": True}), "export")


def test_fp8_needs_a_device_and_a_build_that_know_it(monkeypatch):
    config = load_config({"compute_type": "fp8", "train_dataset_path": "a", "stage": "PT"})
    for build, found, words in (
        (None, [], "no GPU"), (None, [(9, 0)], "a build of Paddle for CPUs"), ("3.3.1", [(9, 0), (8, 0)], "older"),
    ):  # fmt: skip
        monkeypatch.setattr("erniekit.base.packages.version", lambda _, build=build: build)
        monkeypatch.setattr("erniekit.base.resources.capabilities", lambda found=found: found)
        (line,) = fp8_device(config)
        assert line.startswith("argument: compute_type: fp8 needs") and words in line and "fp8_emulate: true" in line
        assert line in refused(require_ready, config) and line in not_checked_here(config)
    monkeypatch.setattr("erniekit.base.resources.capabilities", lambda: [(9, 0), (10, 3)])
    assert fp8_device(config) == []
    monkeypatch.setattr("erniekit.base.resources.capabilities", list)
    for keys in ({"fp8_emulate": True, "compute_type": "fp8"}, {"compute_type": "bf16"}):
        assert fp8_device(load_config(keys)) == []


def test_absent_files(tmp_path):
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    config = load_config(
        {
            "model_name_or_path": tmp_path / "model",
            "train_dataset_path": f"{tmp_path}/there.jsonl,{tmp_path}/no.jsonl,{tmp_path}/t*.jsonl,owner/name:train",
            "eval_dataset_path": [tmp_path / "no2.jsonl", f"{tmp_path}/n*.jsonl"],
            "mix_strategy": "concat",
            "output_dir": "x",
        }
    )
    expected = [
        f"argument: train_dataset_path: '{tmp_path}/no.jsonl' is not here.",
        f"argument: eval_dataset_path: '{tmp_path}/no2.jsonl' is not here.",
        f"argument: eval_dataset_path: '{tmp_path}/n*.jsonl' is not here.",
    ]
    assert absent_files(config) == not_checked_here(config) == refused(require_ready, config) == expected


def test_what_train_needs():
    lines = refused(require_ready, load_config({}))
    assert [line.partition(" ")[0] for line in lines] == ["model_name_or_path", "train_dataset_path", "output_dir"]


@pytest.mark.parametrize(
    ("model", "hub", "command"),
    [
        ("models/ERNIE-4.5-VL-28B-A3B-Paddle/", "modelscope", "modelscope download --model "
         "baidu/ERNIE-4.5-VL-28B-A3B-Paddle --local_dir models/ERNIE-4.5-VL-28B-A3B-Paddle"),
        ("/models/ERNIE-4.5-0.3B-PT", "aistudio",
         "aistudio download --model baidu/ERNIE-4.5-0.3B-PT --local_dir /models/ERNIE-4.5-0.3B-PT"),
        ("./mine", None, "Make one with `erniekit init`, or download one: "
         "hf download baidu/ERNIE-4.5-0.3B-PT --local-dir ./mine"),
    ],
)  # fmt: skip
def test_a_missing_model_names_the_download_command(model, hub, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = absent_files(load_config({"model_name_or_path": model, "download_hub": hub}))
    assert line.endswith(command)


@pytest.mark.parametrize(
    ("hub", "place", "command"),
    [
        (None, "huggingface", "hf download {0} --local-dir {0}"),
        ("modelscope", "modelscope", "modelscope download --model {0} --local_dir {0}"),
        ("aistudio", "aistudio", "aistudio download --model {0} --local_dir {0}"),
    ],
)
def test_a_repository_is_downloaded_and_not_absent(hub, place, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "baidu/ERNIE-4.5-0.3B-PT"
    config = load_config({"model_name_or_path": name, "download_hub": hub})
    assert absent_files(config) == []
    (line,) = not_checked_here(config)
    assert f"'{name}' is not here; `train` downloads it from {place}." in line
    assert line.endswith(command.format(name))
    (tmp_path / name).mkdir(parents=True)  # a folder of that name wins
    assert not_checked_here(config) == []


def test_the_nearest_name_beside_an_absent_file(tmp_path):
    (tmp_path / "dialogues.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    config = load_config({"model_name_or_path": tmp_path / "mdoel", "train_dataset_path": tmp_path / "dialogs.jsonl"})
    model, data = absent_files(config)
    assert f"Did you mean '{tmp_path}/model'? Make one with" in model
    assert data.endswith(f"is not here. Did you mean '{tmp_path}/dialogues.jsonl'?")


def test_a_local_folder_is_not_taken_for_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    (line,) = absent_files(load_config({"model_name_or_path": "output/base"}))
    assert "erniekit init" in line
