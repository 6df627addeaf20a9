"""The resolved configuration: flat, written and run again, compared on resume."""

import json

import pytest

from erniekit.config.load import load_config
from erniekit.config.run import KEYS, SECTIONS

KEYS_GIVEN = {
    "model_name_or_path": "a b/c: d #e",
    "train_dataset_path": ["x.jsonl", "y,z.jsonl"], "train_dataset_prob": [0.25, 0.75],
    "learning_rate": 1e-4, "max_steps": 7, "num_train_epochs": 2, "lora": False, "per_device_train_batch_size": 2,
    "pp_seg_method": [0, 29, 57], "limit_mm_per_prompt": {"image": 100, "video": 1}, "sharding": "stage1",
    "recompute": True, "skip_data_intervals": [[1, 2], [5, 9]], "output_dir": "/tmp/ü", "beta": 0.3,
}  # fmt: skip


@pytest.fixture
def config():
    return load_config(KEYS_GIVEN)


def test_every_key_once_in_flat(config):
    flat = config.flat()
    assert list(flat) == [name for name in KEYS if name != "wandb_api_key"]
    assert flat["learning_rate"] == config.optimizer.learning_rate == config.value("learning_rate") == 1e-4
    assert json.loads(json.dumps(flat)) == flat


def test_written_and_run_again(config, tmp_path):
    path = tmp_path / "run.yaml"
    config.write_resolved(path)
    again = load_config(path)
    assert again.flat() == config.flat()
    assert again.results_hash() == config.results_hash()
    assert again.notices == config.notices
    assert "extends" not in path.read_text()
    again.write_resolved(tmp_path / "again.yaml")
    lines = path.read_text().splitlines()
    assert (tmp_path / "again.yaml").read_text().splitlines()[1:] == lines[1:]


def test_a_written_file_says_nothing_new(tmp_path):
    load_config({}).write_resolved(tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml").notices == ()


def test_the_written_file_holds_the_defaults_that_decide(config):
    text = config.text()
    for line in ("weight_decay: 0.0", "mix_strategy: random", "seed: 42", "compute_type: bf16", "batch_size: 2"):
        assert f"\n{line}\n" in text
    assert "lora_rank" not in text


def test_passwords_are_not_written():
    config = load_config({"wandb_api_key": "hush"})
    assert "hush" not in config.text()
    assert "hush" not in json.dumps(config.flat())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 2e-4), ("seed", 1), ("max_seq_len", 128), ("train_dataset_path", "z.jsonl"),
        ("batch_size", 4), ("compute_type", "fp32"),
        ("moe_use_aux_free", True), ("packing", False), ("model_name_or_path", "other"),
        ("num_train_epochs", 5), ("lora_rank", 16),
    ],
)  # fmt: skip
def test_what_may_not_change_on_resume(key, value):
    before = load_config({"max_steps": 5})
    after = load_config({"max_steps": 5, key: value})
    assert after.difference(before.flat()) == [(key, before.value(key), after.value(key))]
    assert before.difference(json.loads(json.dumps(after.flat()))) == [(key, after.value(key), before.value(key))]
    assert before.results_hash() != after.results_hash()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 50), ("logging_steps", 7), ("save_steps", 7), ("eval_steps", 7), ("save_strategy", "epoch"),
        ("evaluation_strategy", "steps"), ("output_dir", "elsewhere"), ("overwrite_output_dir", True),
        ("resume_anyway", True), ("save_total_limit", 2), ("recompute", True), ("tensorwise_offload_optimizer", True),
        ("do_eval", True), ("disable_tqdm", True), ("logging_dir", "x"), ("max_new_tokens", 5), ("port", 80),
        ("eval_dataset_path", "e.jsonl"),
    ],
)  # fmt: skip
def test_what_may_change_on_resume(key, value):
    before, after = load_config({}), load_config({key: value})
    assert after.value(key) != before.value(key)
    assert after.difference(before.flat()) == []
    assert before.results_hash() == after.results_hash()


def test_a_key_that_the_other_version_did_not_know(config):
    flat = config.flat()
    del flat["seed"]
    assert config.difference(flat) == []


def test_sections_are_plain_and_frozen(config):
    assert set(SECTIONS) >= {"model", "data", "train", "parallel", "align", "generate", "export", "serve", "vision"}
    with pytest.raises(AttributeError):
        config.train.seed = 1
