"""Folders that many ranks write together: the bytes of those that one process writes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from erniekit.base.errors import MeshError
from erniekit.checkpoint import together
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import HostParameters, build_model, save_model
from erniekit.checkpoint.pieces import Span
from erniekit.checkpoint.save import save_folder
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh
from tests.parallel.ranks import run_ranks

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MODELS = (
    "dense/tied/pt", "dense/untied_bias/paddle", "moe/noshared_untied/pt", "paddle_real/dense_mha",
    "paddle_real/dense_tied_bf16_u16", "paddle_real/moe_mtp", "paddle_real/moe_mtp without",
    "paddle_real/moe_shared_bf16_sharded",
)  # fmt: skip
FORMS = (("pt", "bfloat16", 10**9), ("paddle", "float32", 10**9), ("paddle", "bfloat16", 60_000))
LAYOUTS = [
    Layout(2, tensor=2), Layout(2, tensor=2, expert=2, experts_over="tensor"), Layout(2, sharding=2, stage=3),
    Layout(4, tensor=4), Layout(4, tensor=2, expert=2), Layout(4, tensor=2, sharding=2, stage=3),
]  # fmt: skip


def forms(model: str, layout: Layout) -> tuple[tuple[str, str, int], ...]:
    """In which forms a model is written: over the layouts, in each."""
    return FORMS[(MODELS.index(model) + LAYOUTS.index(layout)) % len(FORMS) :][:1]


def opened(model: str) -> tuple[Folder, ErnieConfig]:
    """A model; "without" the multi-token prediction that its folder has."""
    name, *without = model.split(" ")
    base = Folder.open(GOLDEN / name)
    return base, base.config.replace(num_nextn_predict_layers=0) if without else base.config


def digests(folder: Path) -> dict[str, str]:
    """Every file, hidden ones too, by its content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fits(cfg: ErnieConfig, layout: Layout) -> bool:
    """Whether a model can be cut so."""
    return not any(n % layout.tensor for n in (cfg.num_attention_heads, cfg.vocab_size, cfg.intermediate_size)) and (
        layout.expert == 1 or cfg.is_moe
    )


def shard_spans(shapes: dict[str, list[int]], mesh: Mesh) -> dict[str, Span]:
    """What a rank has of its blocks where weights are sharded: uneven parts, some of them empty."""
    index, ranks = mesh.coordinates.shard, mesh.layout.sharding
    if ranks == 1 or mesh.layout.stage < 3:
        return {}
    spans = {}
    for number, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        ends = [0, *((size * (i + 1)) // ranks + (number % 3) for i in range(ranks - 1)), size]
        ends = [min(end, size) for end in ends] if number % 5 else [0] * ranks + [size]
        spans[name] = (ends[index], ends[index + 1])
    return spans


def save_all(mesh: Mesh, target: Path) -> None:
    """Every model in every form, out of this rank's part of it."""
    for model in MODELS:
        base, cfg = opened(model)
        if not fits(cfg, mesh.layout):
            continue
        part = build_model(base, cfg, cut=Cut.of(mesh.layout, mesh.rank))
        spans = shard_spans({name: p.shape for name, p in part.named_parameters()}, mesh)
        arrays = HostParameters(dict(part.named_parameters()))
        numbers = {name: np.array(array) for name, array in arrays.items()}
        for name, (start, stop) in spans.items():
            numbers[name] = numbers[name].reshape(-1)[start:stop]
        for layout, dtype, most in forms(model, mesh.layout):
            save_folder(
                target / model / f"{layout}-{dtype}", numbers, cfg=cfg, layout=layout, dtype=dtype, base=base,
                max_shard_bytes=most, team=mesh, spans=spans,
            )  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    target = tmp_path_factory.mktemp("single")
    for model in MODELS:
        base, cfg = opened(model)
        whole = build_model(base, cfg)
        for layout, dtype, most in FORMS:
            save_model(
                whole, target / model / f"{layout}-{dtype}", layout, dtype=dtype, base=base, max_shard_bytes=most
            )  # fmt: skip
    return target


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_write_the_bytes_of_one_process(layout: Layout, single: Path, tmp_path: Path) -> None:
    run_ranks(save_all, layout, tmp_path)
    written, expected = digests(tmp_path), digests(single)
    assert {Path(name).parents[1] for name in written} == {
        Path(model) for model in MODELS if fits(opened(model)[1], layout)
    }
    for folder in {str(Path(name).parent) for name in written}:
        assert {name: digest for name, digest in written.items() if name.startswith(folder)} == {
            name: digest for name, digest in expected.items() if name.startswith(folder)
        }


def save_blindly(mesh: Mesh, target: Path) -> str:
    """Save where every rank looks for the folder in another place, as without a shared file system."""
    base = Folder.open(GOLDEN / "dense/tied/pt")
    part = build_model(base, base.config, cut=Cut.of(mesh.layout, mesh.rank))
    together._PATIENCE = 0.2
    if mesh.rank:
        told = mesh.words.share
        mesh.words.share = lambda name, value=None: ["/elsewhere", *told(name, value)[1:]]  # type: ignore[method-assign]
    try:
        save_model(part, target / "model", "pt", base=base, team=mesh)
    except MeshError as error:
        return str(error)
    return "saved"


def test_a_rank_that_does_not_see_the_folder_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    said = run_ranks(save_blindly, Layout(2, tensor=2), tmp_path)
    assert all("rank 1 cannot see the folder" in text and "output_dir" in text for text in said)
    assert list(tmp_path.rglob("*")) == []
