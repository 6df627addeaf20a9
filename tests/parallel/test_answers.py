"""`eval` on several ranks, each with its part of the model: the figures and the answers of one process."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from paddle import nn

from erniekit.base.errors import ConfigError
from erniekit.checkpoint.load import load_model
from erniekit.config.load import load_config
from erniekit.recipes import evaluate as evaluation
from erniekit.recipes import train
from tests.end_to_end.conftest import Bench
from tests.parallel.launched import run_ranked
from tests.quantised import quantise_folder

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor_parallel_degree": 2, "sequence_parallel": True}),
    "experts over tensor": (2, {"tensor_parallel_degree": 2, "moe_group": "mp", **SAMPLED}),
    "experts": (2, {"expert_parallel_degree": 2, **SAMPLED, "packing": True}),
    "tensor and experts": (4, {"tensor_parallel_degree": 2, "expert_parallel_degree": 2, **SAMPLED}),
}
FIGURES = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_tokens")


def measured(config: Path, **overrides: Any) -> None:
    evaluation.evaluate(load_config(config, overrides))


def measured_in_parts(config: Path, **overrides: Any) -> None:
    """The same on a rank, which must not have the whole model."""
    load, whole = evaluation.load_for_answers, load_model

    def load_part(folder: Path, **how: Any) -> Any:
        model = load(folder, **how)
        assert size_of(model) < size_of(whole(folder)), "a rank holds the whole model"
        return model

    evaluation.load_for_answers = load_part
    measured(config, **overrides)


def size_of(model: nn.Layer) -> int:
    return sum(p.size for p in model.parameters())


def found_in(out: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The figures and the answers that an evaluation has written."""
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    return metrics, [json.loads(line) for line in (out / "eval" / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_figures_and_answers_are_those_of_one_process(bench: Bench, tmp_path: Path, name: str) -> None:
    world, keys = LAYOUTS[name]
    config = bench.config(tmp_path / "one", eval_generate=5, max_new_tokens=12, per_device_eval_batch_size=3)
    alone = {key: value for key, value in keys.items() if not key.endswith(("_degree", "_parallel", "_group"))}
    measured(config, **alone)
    overrides = {**keys, "output_dir": tmp_path / "ranks"}
    assert run_ranked(config, world, overrides, recipe=measured_in_parts) == [""] * world
    (mine, answers), (its, expected) = found_in(tmp_path / "ranks"), found_in(tmp_path / "one")
    assert answers == expected and any(answer["answer"] for answer in answers)
    assert {name: mine[name] for name in FIGURES} == pytest.approx({name: its[name] for name in FIGURES}, rel=1e-5)


def test_an_adapter_beside_a_base_of_few_bits(bench: Bench, tmp_path: Path) -> None:
    lora = {"fine_tuning": "LoRA", "lora_rank": 4, "compute_type": "wint4", "save_strategy": "'no'"}
    config = bench.config(tmp_path / "lora", **lora, eval_generate=3, max_new_tokens=8, max_steps=2)
    train(config, learning_rate=0.05)
    measured(config)
    figures, expected = found_in(tmp_path / "lora")
    keys = {"tensor_parallel_degree": 2, "moe_group": "mp", "sequence_parallel": True}
    assert run_ranked(config, 2, keys, recipe=measured_in_parts) == ["", ""]
    mine, answers = found_in(tmp_path / "lora")
    assert answers == expected
    assert {name: mine[name] for name in FIGURES} == pytest.approx({name: figures[name] for name in FIGURES}, rel=1e-5)


def measured_beside(config: Path, *, reference: Path, **overrides: Any) -> None:
    evaluation.evaluate(load_config(config, overrides), reference=str(reference))


def test_a_quantised_folder_whose_experts_are_shared(bench: Bench, tmp_path: Path) -> None:
    small = quantise_folder(bench.model, tmp_path / "small", "w4a8c8")
    keys = {"model_name_or_path": small, "per_device_eval_batch_size": 3, "eval_generate": 3, "max_new_tokens": 8}
    config, beside = bench.config(tmp_path / "one", **keys), functools.partial(measured_beside, reference=bench.model)
    beside(config)
    figures, expected = found_in(tmp_path / "one")
    overrides = {"expert_parallel_degree": 2, "output_dir": tmp_path / "ranks"}
    assert run_ranked(config, 2, overrides, recipe=beside) == ["", ""]
    mine, answers = found_in(tmp_path / "ranks")
    assert answers == expected
    names = (*FIGURES, "eval_kl", "eval_same_best_token", "error")
    assert {name: mine[name] for name in names} == pytest.approx({name: figures[name] for name in names}, rel=1e-4)
    assert mine["eval_kl"] > 0 and mine["memory_bytes"] < figures["memory_bytes"]
    for said in run_ranked(config, 2, {"tensor_parallel_degree": 2, "expert_parallel_degree": 1}, recipe=measured):
        assert "is quantised, and codes are not cut over tensor ranks (tensor_parallel_degree is 2)" in said


def test_one_process_says_what_the_degrees_need(bench: Bench, tmp_path: Path) -> None:
    """What only training shards asks for no ranks."""
    config = bench.config(tmp_path / "one", eval_generate=0, sharding="stage2", sharding_parallel_degree=2)
    measured(config)
    with pytest.raises(ConfigError, match=r"one process. Start 2 of them: erniekit eval .* --nproc 2"):
        measured(config, tensor_parallel_degree=2)
