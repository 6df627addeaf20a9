"""Evaluation and answers over ranks: all do equally many forward passes, and find what one process finds, however few
rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paddle
import pytest

from erniekit.checkpoint.folder import Folder
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.data.batch import PreferenceBatch
from erniekit.data.build import build_eval_data
from erniekit.data.tokenizer import Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.rollout import brief
from erniekit.training.assemble import architecture, assemble_optimizer
from erniekit.training.evaluate import measure
from erniekit.training.held_out import measure_preferences
from erniekit.training.objective import LossWeights
from erniekit.training.preference import answer_log_probs, preference_objective
from erniekit.training.weights import weights_of
from tests.end_to_end.conftest import Bench, dialogue, write_rows
from tests.parallel.ranks import run_ranks

BATCH = 2
NUM_ROWS = (1, 5)  # fewer than ranks; a last batch of a single row
LAYOUTS = {
    "experts": Layout(2, expert=2), "tensor": Layout(2, tensor=2), "weights": Layout(2, sharding=2, stage=3),
    "experts, weights": Layout(2, expert=2, sharding=2, stage=3),
}  # fmt: skip


def row_of(stage: str, number: int) -> dict[str, Any]:
    """A dialogue, or a question with two answers; one of them by itself for KTO."""
    made = dialogue(number)
    if stage in ("PT", "SFT"):
        return made
    (question, other), (answer, _) = made["src"], made["tgt"]
    judged = {"src": [question], "tgt": [], "response": [[answer], [other]], "sort": [number % 2, (number + 1) % 2]}
    return judged if stage == "KTO" else {"question": question, "chosen": answer, "rejected": other}


def reference(model: ErnieForCausalLM, batch: PreferenceBatch) -> paddle.Tensor:
    """A policy that knows less."""
    return answer_log_probs(model, batch) * 1.1


def evaluated(mesh: Mesh, model_folder: Path, folder: Path) -> dict[str, Any]:
    """For each stage and number of rows what is measured, and what the model answers."""
    found: dict[str, Any] = {}
    tokenizer = Tokenizer.from_folder(model_folder)
    for stage in ("SFT", "DPO", "KTO", "RM"):
        cfg = load_config({"compute_type": "fp32", "stage": stage, "max_seq_len": 64, "loss_type": "sigmoid"})
        base = Folder.open(model_folder)
        model = weights_of(cfg, base, architecture(base, cfg), mesh).build(None)
        assemble_optimizer(model, cfg, mesh=mesh)  # which takes weights apart
        for num in NUM_ROWS:
            keys = {"eval_dataset_path": str(folder / f"{stage}-{num}.jsonl"), "data_cache_dir": str(folder / "cache")}
            data_keys = load_config({**cfg.flat(), **keys}).data
            data = build_eval_data(data_keys, tokenizer, stage=stage, align=cfg.align)
            name = f"{stage} with {num} rows"
            if stage == "SFT":
                found[name] = measure(model, data, batch_size=BATCH, mesh=mesh)
                found[f"answers to {num}"] = brief.brief_answers(model, tokenizer, data.prompts(2), mesh=mesh)
                continue
            used = None if stage == "RM" else reference
            objective = preference_objective(stage, cfg.align, LossWeights(), reference=used, mesh=mesh)
            found[name] = measure_preferences(objective, model, data, batch_size=BATCH)
    return found


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of few rows."""
    folder = tmp_path_factory.mktemp("held-out")
    for stage in ("SFT", "DPO", "KTO", "RM"):
        for num in NUM_ROWS:
            write_rows(folder / f"{stage}-{num}.jsonl", [row_of(stage, number) for number in range(num)])
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_words() -> Iterator[None]:
    """Answers are short, and no clock ends them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brief, "TOKENS", 5)
        patch.setattr(brief, "_SECONDS", 1e9)
        yield


@pytest.fixture(scope="module")
def expected(bench: Bench, held_out: Path, few_words: None) -> dict[str, Any]:
    """What one process finds."""
    return evaluated(Mesh.single(), bench.model, held_out)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_few_rows_are_measured_and_answered_as_by_one_process(
    bench: Bench, held_out: Path, expected: dict[str, Any], name: str
) -> None:
    for found in run_ranks(evaluated, LAYOUTS[name], bench.model, held_out):
        for case, figures in expected.items():
            wanted = figures if isinstance(figures, list) else pytest.approx(figures, rel=2e-5, abs=1e-6)
            assert found[case] == wanted, case
