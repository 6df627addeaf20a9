"""Everything that moves weights, or keeps some of them where they are, does on ranks what it does in one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from erniekit.config.layout import Layout
from erniekit.training import clipping
from tests.parallel.equal import Case, assert_parallel_equals_single, furthest
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

TEXT, PAIRS = (steps_of(make, steps=2, micro_batches=1) for make in (packed_row, pair_row))
ADAMW: dict[str, Any] = {"stage": "SFT", "adam_epsilon": 1e-4, "weight_decay": 0.1}
ROUTERS = {
    "moe_orthogonal_loss_lambda": 0.4, "use_ortho_loss_callback": True, "moe_use_aux_free": True,
    "moe_use_aux_free_update_coef": 0.01,
}  # fmt: skip
RATES = {"lr_multipliers": {"experts": 3.0}, "moe_gate_lr_ratio": 0.5, "layerwise_lr_decay_bound": 0.5}
LORA = {"fine_tuning": "LoRA", "lora_plus_scale": 4.0}
KEYS: dict[str, dict[str, Any]] = {
    "adaptive clipping": {**ADAMW, "adaptive_norm_clip": True},
    "averages, rates and routers": {**ADAMW, **ROUTERS, **RATES, "ema_decay": 0.5},
    "muon": {**ADAMW, "optim": "muon"},
    "the embedding alone": {"stage": "SFT", "train_emb_only": 1},
    "experts alone": {"stage": "SFT", **ROUTERS, "train_moe_only": 1},
    "frozen": {"stage": "SFT", "freeze": [r"layers\.0\.", "embed_tokens"]},
    "whole modules": {
        "stage": "SFT", **ROUTERS, **LORA, "modules_to_save": ["embed_tokens", "mlp.gate", "input_layernorm"],
    },
    "a reference that moves": {
        "stage": "DPO", **LORA, "ref_model_update_steps": 1, "modules_to_save": ["embed_tokens"],
    },
}  # fmt: skip
BY_OPTIMIZER = ("adaptive clipping", "averages, rates and routers", "muon")  # not by plain descent
SHARDED = [name for name in KEYS if name not in ("muon", "a reference that moves")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = write_model(
        tmp_path_factory.mktemp("models") / "sparse", sparse=True, num_hidden_layers=2, moe_layer_end_index=1
    )
    made = {}
    for name, keys in KEYS.items():
        steps = PAIRS if keys["stage"] == "DPO" else TEXT
        made[name] = Case(folder, steps, keys, rate=0.01 if name in BY_OPTIMIZER else 0.1, adamw=name in BY_OPTIMIZER)
    return made


@pytest.mark.parametrize(("layout", "names"), [
    (Layout(2, expert=2), ["muon"]),
    (Layout(2, sharding=2, stage=1), SHARDED),
    (Layout(4, expert=2, sharding=2, stage=2), [*SHARDED, "a reference that moves"]),
    (Layout(2, sharding=2, stage=3), SHARDED),
    (Layout(4, tensor=2, sharding=2, stage=3, sequence_parallel=True), SHARDED),
    (Layout(4, tensor=2, expert=2), [name for name in KEYS if name != "muon"]),
], ids=["experts", "states", "experts, gradients", "weights", "tensor, weights", "tensor, experts"])  # fmt: skip
def test_weights_move_as_in_one_process(
    cases: dict[str, Case], layout: Layout, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "FIRST_STEP", 1)  # adaptive clipping only watches before
    assert_parallel_equals_single([cases[name] for name in names], layout)


def test_every_key_does_something(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be equal on any ranks."""
    monkeypatch.setattr(clipping, "FIRST_STEP", 1)
    plain: dict[str, Case] = {}
    for name, case in cases.items():
        keys = dict(ADAMW if name in BY_OPTIMIZER else {"stage": case.cfg.model.stage})
        keys |= LORA if "fine_tuning" in case.keys else {}
        without = plain.setdefault(str(keys), dataclasses.replace(case, keys=keys)).alone.weights
        assert max(furthest(case.alone.weights[each], without[each]) for each in without) > 1e-3, name
