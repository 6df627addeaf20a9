"""Whose output folder it is: layouts may change between the halves of a run, its rows may not."""

from pathlib import Path

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config
from erniekit.training.run_folder import claim, identity


def take(path: Path, data_ranks: int, *, fingerprint: str = "words", **keys: object) -> None:
    """Begin a run in `path`, or go on with the one that is there."""
    cfg = load_config({"output_dir": path, **keys})
    record = identity(cfg, fingerprint=fingerprint, data_ranks=data_ranks)
    folder = claim(path, cfg, record=record, total_steps=5)
    folder.mark(record, finished_at=None)
    folder.release()


def refused(path: Path, data_ranks: int, **keys: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        take(path, data_ranks, **keys)
    return [line.strip() for line in caught.value.problems[1:-1]]


def test_the_same_rows_on_other_ranks(tmp_path):
    take(tmp_path, 4, batch_size=2)
    take(tmp_path, 2, batch_size=4, tensor_parallel_degree=2)
    take(tmp_path, 1, batch_size=8, sharding="stage2")


def test_other_rows_are_another_run(tmp_path):
    take(tmp_path, 4, batch_size=2)
    rows = "rows of a micro-batch, batch_size x ranks with rows of their own: 8, now"
    assert refused(tmp_path, 2, batch_size=2, fingerprint="other") == [f"{rows} 4 (batch_size=4 keeps them)"]
    assert refused(tmp_path, 3, batch_size=2, fingerprint="other") == [f"{rows} 6"]
    assert refused(tmp_path, 1, batch_size=8, seed=3) == ["seed: was 42, is 3"]
    assert refused(tmp_path, 1, batch_size=8, fingerprint="other") == ["the content of the training data"]
    assert refused(tmp_path, 1, batch_size=8, gradient_accumulation_steps=2, fingerprint="other") == [
        "gradient_accumulation_steps: was 1, is 2"
    ]
