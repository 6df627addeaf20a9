"""Runs drawn at random: a small architecture, what is trained of it and how, and a layout that the program accepts.

What nobody thought of combining is combined here. A seed is a run; a failure names it, and the keys that it stands for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.errors import ConfigError, MeshError
from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import Layout, layout_of
from erniekit.config.load import load_config
from erniekit.training.assemble import check_names
from tests.parallel.equal import Case
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

_ATTEMPTS = 1000
_RATE = 0.02
_BY_NAME = ("freeze", "lora_target_modules", "modules_to_save", "dora")
_DEGREES = (
    "tensor_parallel_degree", "expert_parallel_degree", "moe_group", "sharding", "sharding_parallel_degree",
    "sequence_parallel",
)  # fmt: skip


class Chance:
    """Draws from what it is offered."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def one(self, *offered: Any) -> Any:
        """One of them."""
        return offered[int(self._rng.integers(len(offered)))]

    def so(self, probability: float) -> bool:
        """Yes, with this probability."""
        return bool(self._rng.random() < probability)

    def some(self, offered: dict[str, tuple[Any, ...]], probability: float) -> dict[str, Any]:
        """Some of the keys, each with one of its values."""
        return {name: self.one(*values) for name, values in offered.items() if self.so(probability)}


def draw(seed: int, folder: Path) -> tuple[Case, Layout]:
    """A run and its layout; the model is written to `folder`."""
    chance = Chance(seed)
    keys = _training(chance)
    keys |= _degrees(chance)
    for attempt in range(_ATTEMPTS):
        model, world = _architecture(chance), chance.one(2, 3, 4, 4)
        try:
            layout = layout_of(load_config(keys), world, ErnieConfig(**model))
            break
        except MeshError:
            if attempt % 50 == 49:  # no model will ever fit
                keys = {name: value for name, value in keys.items() if name not in _DEGREES} | _degrees(chance)
    else:
        raise AssertionError(f"seed {seed}: no layout fits")
    bias = chance.so(0.3)
    write_model(folder, sparse="moe_k" in model, head_bias=bias, seed=seed, **model)
    if not model["num_nextn_predict_layers"]:
        keys.pop("num_nextn_predict_layers", None)
    case = Case(folder, [], keys)
    try:
        check_names(case.weights, case.arch, case.cfg)
    except ConfigError:  # the model has no such modules
        keys = {name: value for name, value in keys.items() if name not in _BY_NAME}
    rows = layout.data * chance.one(1, 2)
    make = pair_row if keys["stage"] in ("DPO", "RM") else packed_row
    steps = steps_of(make, steps=2, micro_batches=chance.one(1, 2, 3), rows=rows)
    return Case(folder, steps, keys, rate=_RATE), layout


def _architecture(chance: Chance) -> dict[str, Any]:
    kv_heads, layers, sparse = chance.one(1, 2, 3, 4), chance.one(1, 2, 3), chance.so(0.75)
    found = {
        "vocab_size": chance.one(64, 66, 72), "hidden_size": chance.one(8, 12, 16, 24),
        "intermediate_size": chance.one(12, 24, 36), "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * chance.one(1, 2, 4), "head_dim": chance.one(4, 8), "use_bias": chance.so(0.3),
        "tie_word_embeddings": chance.so(0.5), "num_nextn_predict_layers": chance.one(0, 0, 1, 2),
    }  # fmt: skip
    if not sparse:
        return found
    experts = chance.one(2, 3, 4, 6, 8)
    return found | {
        "model_type": "ernie4_5_moe", "moe_num_experts": experts, "moe_k": chance.one(1, 2, min(3, experts)),
        "moe_intermediate_size": chance.one(4, 8, 12), "moe_num_shared_experts": chance.one(0, 1, 2),
        "moe_layer_start_index": chance.one(0, 0, layers - 1), "moe_layer_end_index": layers - 1,
        "moe_layer_interval": chance.one(1, 1, 2),
    }  # fmt: skip


def _degrees(chance: Chance) -> dict[str, Any]:
    keys = chance.one(
        {"tensor_parallel_degree": 2}, {"tensor_parallel_degree": 4}, {"tensor_parallel_degree": 3},
        {"tensor_parallel_degree": 2, "moe_group": "mp"}, {"tensor_parallel_degree": 4, "moe_group": "mp"},
        {"expert_parallel_degree": 2}, {"expert_parallel_degree": 4}, {"moe_group": "data"}, {}, {},
        {"tensor_parallel_degree": 2, "expert_parallel_degree": 2},
    ) | chance.some({"sharding_comm_buffer_size_MB": (1,)}, 0.2)  # fmt: skip
    if chance.so(0.5) or not keys:
        keys |= {"sharding": chance.one("stage1", "stage2", "stage3")}
        keys |= chance.some({"sharding_parallel_degree": (2, 4)}, 0.5)
    return keys | chance.some({"sequence_parallel": (True,)}, 0.5 if "tensor_parallel_degree" in keys else 0.0)


def _training(chance: Chance) -> dict[str, Any]:
    stage = chance.one("SFT", "SFT", "SFT", "DPO", "RM")
    keys: dict[str, Any] = {"stage": stage, "compute_type": "fp32"} | chance.some({
        "recompute": (True,), "moe_aux_loss_lambda": (0.5,), "moe_z_loss_lambda": (0.3,),
        "moe_orthogonal_loss_lambda": (0.4,), "moe_use_aux_free": (True,), "use_ortho_loss_callback": (True,),
        "max_grad_norm": (0.05, 0.0), "moe_gate_lr_ratio": (0.5,),
    }, 0.4) | {"adam_epsilon": 1e-4, "moe_use_aux_free_update_coef": 0.01}  # fmt: skip
    if keys.get("recompute"):
        keys["recompute_granularity"] = chance.one("full", "full_attn", "core_attn")
    if stage == "SFT":
        keys |= chance.some({"token_balance_loss": (True,), "multi_token_pred_lambda": (1.0,)}, 0.3)
    else:
        keys |= chance.some({"num_nextn_predict_layers": (1,)}, 0.3 if stage == "DPO" else 0.0)
    if stage == "DPO":
        keys["loss_type"] = chance.one("sigmoid", "ipo", "simpo", "orpo") if chance.so(0.8) else "simpo"
    if chance.so(0.4):
        return keys | _adapter(chance, reference=keys.get("loss_type"))
    if keys.get("loss_type") in ("sigmoid", "ipo"):
        keys["loss_type"] = "simpo"  # without an adapter there is no base to compare with
    return keys | chance.some({"freeze": (["embed_tokens"], ["norm"]), "weight_decay": (0.1,)}, 0.2)


def _adapter(chance: Chance, *, reference: str | None) -> dict[str, Any]:
    keys = {"fine_tuning": "LoRA", "lora_rank": chance.one(1, 2, 4)} | chance.some({
        "rslora": (True,), "lora_plus_scale": (4.0,),
        "lora_target_modules": (["attention"], ["mlp"], ["all-linear"], ["experts", "attention"]),
        "modules_to_save": (["embed_tokens"], ["norm"]), "lora_init": ("pissa",),
        "compute_type": ("wint8", "wint4", "wint4/8"),
    }, 0.3)  # fmt: skip
    if keys.get("lora_target_modules") in (["attention"], ["mlp"]) and chance.so(0.5):
        keys["dora"] = True
    if "compute_type" in keys:
        keys.pop("lora_init", None)
    if reference in ("sigmoid", "ipo"):
        keys.pop("modules_to_save", None)
    return keys
