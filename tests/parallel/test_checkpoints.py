"""Checkpoints across layouts: what one process saved is read by the ranks of a layout and saved again, the same bytes;
with the optimizer's states, averages, adapters, a reference that moves, in the foreground and in the background. What
the run leaves at its end is the same, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erniekit.config.layout import Layout
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import assemble_optimizer, router_upkeep
from erniekit.training.reference import PolicyCopy
from erniekit.training.state import Checkpoints, load_memory, load_optimizer
from erniekit.training.weights import Weights, weights_of
from tests.parallel.equal import Case, batches_of, train_step
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import packed_row, steps_of, write_model
from tests.parallel.test_saving import digests

LORA = {"fine_tuning": "LoRA", "lora_rank": 2, "lora_target_modules": ["all-linear", "experts"], "ema_decay": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "all weights": {"optim": "adamw", "ema_decay": 0.5, "adaptive_norm_clip": True},
    "Muon": {"optim": "muon"},
    "some weights": {"freeze": ["embed_tokens", r"layers\.1\."], "save_layout": "paddle"},
    "a reference that moves": {"ref_model_update_steps": 1},
    "adapters": LORA | {"save_layout": "paddle"},
    "PiSSA": LORA | {"lora_init": "pissa", "modules_to_save": ["mlp.gate", "lm_head"]},
    "DoRA": LORA | {"dora": True, "lora_target_modules": ["attention", "mlp"]},
    "adapters on 8 bits": LORA | {"compute_type": "wint8"},
}
AT_STAGE_3 = [name for name in KINDS if name not in ("Muon", "a reference that moves")]  # which are refused there
LAYOUTS = {
    "tensor": (Layout(2, tensor=2), ["a reference that moves", *AT_STAGE_3]),
    "stage 3": (Layout(2, sharding=2, stage=3), AT_STAGE_3),
    "experts": (Layout(2, expert=2), ["all weights", "Muon"]),
    "stage 1": (Layout(2, sharding=2, stage=1), ["all weights", "a reference that moves"]),
    "tensor, experts": (Layout(4, tensor=2, expert=2), ["all weights", "adapters", "adapters on 8 bits"]),
    "tensor, stage 2": (Layout(4, tensor=2, sharding=2, stage=2), ["all weights", "PiSSA"]),
}  # fmt: skip
ENDS = ("final", "False/checkpoint-2", "True/checkpoint-2")


def case_of(folder: Path, kind: str) -> Case:
    """A run."""
    return Case(folder, steps_of(packed_row, steps=2), keys={"compute_type": "fp32", **KINDS[kind]}, adamw=True)


def memory_of(model: ErnieForCausalLM, kind: str) -> PolicyCopy | None:
    """What the run carries from step to step."""
    return PolicyCopy(model, every=1) if "ref_model_update_steps" in KINDS[kind] else None


def checkpoints(mesh: Mesh, case: Case, out: Path, *, background: bool = False) -> tuple[Weights, Checkpoints]:
    """The weights of a run and where it saves."""
    weights = weights_of(case.cfg, case.weights, case.arch, mesh)
    return weights, Checkpoints(out, writer=weights.writer, describe={"of": "a test"}, mesh=mesh, background=background)


def first_life(case: Case, kind: str, out: Path) -> None:
    """One process takes the steps and saves."""
    mesh = Mesh.single()
    weights, saving = checkpoints(mesh, case, out / "False")
    model, objective = weights.build(None), case.objective(mesh)
    model.train()
    optimizer, memory = assemble_optimizer(model, case.cfg), memory_of(model, kind)
    for number, step in enumerate(case.steps):
        if memory:
            memory.before_step(number)
        train_step(
            model, optimizer, batches=batches_of(step, mesh), objective=objective, learning_rate=0.1, row_length=1024,
            upkeep=router_upkeep(model, case.cfg), mesh=mesh,
        )  # fmt: skip
    saving.save(model, optimizer, step=2, progress={"best": {}}, memory=memory)
    weights.save(model, out / "final", final=True, ranges=optimizer.ranges())


def save_again(mesh: Mesh, folder: Path, kinds: list[str], saved: Path, out: Path) -> None:
    """Read the checkpoint of each kind and write it, in the foreground and in the background."""
    for kind in kinds:
        case = case_of(folder, kind)
        for background in (False, True):
            weights, saving = checkpoints(mesh, case, out / kind / str(background), background=background)
            checkpoint = saved / kind / "False" / "checkpoint-2"
            model = weights.build(checkpoint)
            optimizer, memory = assemble_optimizer(model, case.cfg, mesh=mesh), memory_of(model, kind)
            load_optimizer(checkpoint, optimizer, model, mesh)
            if memory:
                load_memory(checkpoint, memory, model, mesh)
            saving.save(model, optimizer, step=2, progress={"best": {}}, memory=memory)
            if not background:
                weights.save(model, out / kind / "final", final=True, ranges=optimizer.ranges())
                continue
            ranges = [numbers for numbers, _ in optimizer.ranges().values()]
            whole = [p for p in model.parameters() if p._is_initialized()]
            for tensor in (*ranges, *whole, *optimizer.state().values(), *(memory.state().values() if memory else ())):
                tensor.detach().zero_()  # what comes after a save does not change it
            saving.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", sparse=True, head_bias=True)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process saved of each kind."""
    out = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        first_life(case_of(model, kind), kind, out / kind)
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_reads_a_checkpoint_and_writes_its_bytes(
    name: str, model: Path, saved: Path, tmp_path: Path
) -> None:
    layout, kinds = LAYOUTS[name]
    run_ranks(save_again, layout, model, kinds, saved, tmp_path, seconds=120)
    for kind in kinds:
        alone = saved / kind
        for end in ENDS:
            assert digests(tmp_path / kind / end) == digests(alone / end.replace("True", "False")), (kind, end)
        for background in ("False", "True"):
            assert [path.name for path in (tmp_path / kind / background).iterdir()] == ["checkpoint-2"]
