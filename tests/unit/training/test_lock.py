"""What a lock holds, and what is found to differ."""

import math

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config
from erniekit.training import lock as locks


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model", "README.md"):
        (tmp_path / "model" / name).write_text(name)
    for name in ("a.jsonl", "b1.jsonl", "b2.jsonl"):
        (tmp_path / name).write_text(name)
    return tmp_path


def config_of(parts, **keys):
    data = f"{parts / 'a.jsonl'},{parts / 'b*.jsonl'},someone/dataset"
    return load_config({"train_dataset_path": data, "max_steps": 3, "learning_rate": "1e-4", **keys})


def lock_of(parts, **keys):
    return locks.lock_of(config_of(parts, **keys), fingerprint="f00", model=parts / "model")


def test_a_lock_goes_to_a_file_and_back(parts):
    lock = lock_of(parts, wandb_api_key="secret")
    locks.write_lock(parts / "run.lock.yaml", lock)
    locks.finish_lock(parts / "run.lock.yaml", config_of(parts, max_steps=9), losses=[0.1 + 0.2, 1e-17, 3.0], ranks=4)
    found = locks.read_lock(parts)
    config = {**lock["config"], "max_steps": 9}
    assert found == {**lock, "config": config, "ranks": 4, "losses": [0.1 + 0.2, 1e-17, 3.0]}
    assert [path.rsplit("/")[-1] for path in found["data"]["files"]] == ["a.jsonl", "b1.jsonl", "b2.jsonl"]
    assert set(found["model"]["files"]) == {"config.json", "model.safetensors", "tokenizer.model"}
    assert "secret" not in (parts / "run.lock.yaml").read_text()
    config = load_config(found["config"])
    assert config.optimizer.learning_rate == 1e-4 and config.train.max_steps == 9


def test_nothing_differs_at_once(parts):
    lock = lock_of(parts)
    assert locks.changed_files(lock) == [] and locks.changed_surroundings(lock) == []


def test_files_that_differ_are_named(parts):
    lock = lock_of(parts)
    (parts / "a.jsonl").write_text("other")
    (parts / "b1.jsonl").unlink()
    (parts / "model" / "tokenizer.model").unlink()
    (parts / "model" / "more.safetensors").write_text("x")
    problems = "\n".join(locks.changed_files(lock))
    assert "a.jsonl: its content is another" in problems and "b1.jsonl: is not here" in problems
    assert "tokenizer.model: is not here" in problems and "more.safetensors: was not there then" in problems
    assert "b2.jsonl" not in problems


def test_surroundings_that_differ_are_named(parts):
    lock = lock_of(parts)
    lock["packages"] = {**lock["packages"], "numpy": "0.1", "gone": "1"}
    lock["machine"] = {**lock["machine"], "cpu": "abacus"}
    first, second = locks.changed_surroundings(lock)
    assert "numpy 0.1 -> " in first and "gone 1 -> absent" in first and second.startswith("machine: cpu abacus -> ")


@pytest.mark.parametrize(
    ("then", "now", "worst"),
    [([2.0, 1.0], [2.0, 1.0], 0.0), ([2.0, 1.0], [2.0, 1.1], 0.1), ([1.0], [math.nan], math.inf), ([], [], 0.0)],
)
def test_losses_are_compared_as_shares(then, now, worst):
    assert locks.compare(then, now)[1] == pytest.approx(worst)


def test_what_is_no_lock_is_refused(parts):
    (parts / "x.yaml").write_text("- 1\n")
    (parts / "y.yaml").write_text("a: [\n")
    for name, words in (("x.yaml", "is no lock file"), ("y.yaml", "not valid YAML"), ("z.yaml", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            locks.read_lock(parts / name)
