"""What many ranks saved is exported to the same bytes by many ranks as by one, and is what one process has saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from erniekit.base.runtime import Place
from erniekit.checkpoint.folder import Folder
from erniekit.cli.main import main
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.parallel.mesh import Mesh
from erniekit.recipes import train
from erniekit.training.assemble import architecture, assemble_optimizer
from erniekit.training.state import load_optimizer
from erniekit.training.weights import weights_of
from tests.end_to_end.conftest import Bench
from tests.parallel.ranks import run_places, run_ranks
from tests.parallel.test_saving import digests

LORA = {"fine_tuning": "LoRA", "lora_rank": 2, "learning_rate": "1e-2"}
KINDS: dict[str, dict[str, Any]] = {
    "all weights": {}, "adapters": LORA, "adapters on 8 bits": LORA | {"compute_type": "wint8"},
}  # fmt: skip


def finish(mesh: Mesh, config: Path, run: Path) -> None:
    """Leave the result of a run's last checkpoint in its folder, as the end of training does."""
    cfg = load_config(config)
    base = Folder.open(str(cfg.model.model_name_or_path))
    weights = weights_of(cfg, base, architecture(base, cfg), mesh)
    model = weights.build(run / "checkpoint-2")
    optimizer = assemble_optimizer(model, cfg, mesh=mesh)
    load_optimizer(run / "checkpoint-2", optimizer, model, mesh)
    weights.save(model, run, final=True, ranges=optimizer.ranges())


def export(place: Place, config: Path, run: Path) -> int:
    """`erniekit export`, on a rank as the launcher starts it."""
    os.environ.update(PADDLE_TRAINERS_NUM=str(place.world), PADDLE_TRAINER_ID=str(place.rank), PADDLE_MASTER="a:1")
    return main(["export", str(config), "--out", str(run)])


@pytest.mark.parametrize("kind", KINDS)
def test_what_ranks_saved_and_export_has_the_bytes_of_one_process(kind: str, bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = bench.config(run, **KINDS[kind], max_steps=2, eval_dataset_path=None)
    train(config)
    assert main(["export", str(config), "--out", str(tmp_path / "alone")]) == 0
    for layout in (Layout(2, tensor=2), Layout(2, sharding=2, stage=3)):
        before = digests(run)
        for file in run.glob("*.safetensors"):
            file.unlink()
        run_ranks(finish, layout, config, run)
        assert digests(run) == before
    assert run_places(export, 2, config, tmp_path / "ranks") == [0, 0]
    assert len(digests(tmp_path / "alone")) > 4
    assert digests(tmp_path / "ranks") == digests(tmp_path / "alone")
