"""The commands of the model cards, word for word but for the folder: `check` takes them, training on this machine asks
for degrees of 1 and nothing else, and then the same files train and export a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CARD = "examples/configs/ERNIE-4.5-300B-A47B"
FILES = ("sft/run_sft_wint8mix_lora_8k.yaml", "dpo/run_dpo_wint8mix_lora_8k.yaml")
# for time alone
SMALL = (
    "max_steps=2", "gradient_accumulation_steps=1", "max_seq_len=256", "num_samples_each_epoch=50", "report_samples=0",
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder from which the paths in the files lead somewhere."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_trains_a_tiny_model(name, bench, run, place):
    command = (f"{CARD}/{name}", f"model_name_or_path={bench.model}")
    run("check", command[0])
    _, told = run("train", *command, code=2)
    assert "tensor_parallel_degree" in told and told.count("needs") == 1
    run("train", *command, "tensor_parallel_degree=1", *SMALL)
    assert (place / "output" / "lora_config.json").is_file()  # in ERNIEKit's form, as the base is
    run("export", f"{CARD}/run_export.yaml", f"model_name_or_path={bench.model}", "tensor_parallel_degree=1")
    run("verify", "output/export")
