"""Checkpoints across layouts: what one process saved is read by the ranks of a layout and saved again, the same bytes;
with the optimizer's states, averages, adapters, in the foreground and in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import assemble_optimizer, router_upkeep
from erniekit.training.state import Checkpoints, load_optimizer
from erniekit.training.weights import weights_of
from tests.parallel.equal import Case, batches_of, train_step
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import packed_row, steps_of, write_model
from tests.parallel.test_saving import digests

FULL = {"optim": "adamw", "ema_decay": 0.5, "adaptive_norm_clip": True}
LORA = {"fine_tuning": "LoRA", "lora_rank": 2, "lora_target_modules": ["all-linear", "experts"]}
LAYOUTS = [
    (Layout(2, tensor=2), FULL), (Layout(2, expert=2), FULL), (Layout(2, sharding=2, stage=1), FULL),
    (Layout(2, sharding=2, stage=3), FULL), (Layout(4, tensor=2, expert=2), FULL),
    (Layout(4, tensor=2, sharding=2, stage=2), FULL), (Layout(2, sharding=2, stage=2), LORA),
    (Layout(4, tensor=2, expert=2), LORA),
]  # fmt: skip


def case_of(folder: Path, keys: dict[str, Any]) -> Case:
    """A run."""
    return Case(folder, steps_of(packed_row, steps=2), keys=keys, adamw=True)


def checkpoints(mesh: Mesh, case: Case, out: Path, *, background: bool = False) -> tuple[Any, Checkpoints]:
    """The weights of a run and where it saves."""
    weights = weights_of(case.cfg, case.weights, case.arch, mesh)
    return weights, Checkpoints(out, writer=weights.writer, describe={"of": "a test"}, mesh=mesh, background=background)


def first_life(case: Case, out: Path) -> Path:
    """One process takes the steps and saves."""
    mesh = Mesh.single()
    weights, saving = checkpoints(mesh, case, out)
    model, objective = weights.build(None), case.objective(mesh)
    model.train()
    optimizer = assemble_optimizer(model, case.cfg)
    for step in case.steps:
        train_step(
            model, optimizer, batches=batches_of(step, mesh), objective=objective, learning_rate=0.1, row_length=1024,
            upkeep=router_upkeep(model, case.cfg), mesh=mesh,
        )  # fmt: skip
    return saving.save(model, optimizer, step=2, progress={"best": {}})


def save_again(mesh: Mesh, folder: Path, keys: dict[str, Any], saved: Path, out: Path) -> None:
    """Read a checkpoint and write it, in the foreground and in the background."""
    case = case_of(folder, keys)
    for background in (False, True):
        weights, saving = checkpoints(mesh, case, out / str(background), background=background)
        model = weights.build(saved)
        optimizer = assemble_optimizer(model, case.cfg, mesh=mesh)
        load_optimizer(saved, optimizer, model, mesh)
        with optimizer.whole_weights():
            saving.save(model, optimizer, step=2, progress={"best": {}})
        for p in model.parameters():
            if p._is_initialized():
                p.detach().zero_()  # what comes after a save does not change it
        for tensor in optimizer.state().values():
            tensor.detach().zero_()
        saving.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, and what one process saved after training all of it, and adapters."""
    folder = write_model(tmp_path_factory.mktemp("model") / "model", sparse=True, head_bias=True)
    found = {"model": folder}
    for name, keys in (("full", FULL), ("lora", LORA)):
        found[name] = first_life(case_of(folder, keys), tmp_path_factory.mktemp(name))
    return found


@pytest.mark.parametrize(("layout", "keys"), LAYOUTS, ids=str)
def test_any_layout_reads_a_checkpoint_and_writes_its_bytes(
    layout: Layout, keys: dict[str, Any], saved: dict[str, Any], tmp_path: Path
) -> None:
    before = saved["lora" if keys is LORA else "full"]
    run_ranks(save_again, layout, saved["model"], keys, before, tmp_path)
    for background in (False, True):
        assert digests(tmp_path / str(background) / "checkpoint-2") == digests(before)
        assert [path.name for path in (tmp_path / str(background)).iterdir()] == ["checkpoint-2"]
