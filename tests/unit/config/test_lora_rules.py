"""Adapters beside keys that exclude them: each contradiction names both keys and a way out."""

from __future__ import annotations

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"optim": "muon"}, ("optim: muon", "fine_tuning: LoRA", "adamw")),
        ({"train_emb_only": 1}, ("train_emb_only: 1", "fine_tuning", "modules_to_save")),
        ({"train_moe_only": 1}, ("train_moe_only: 1", "fine_tuning", "lora_target_modules")),
        ({"mtp_init": "random"}, ("mtp_init: random", "fine_tuning")),
        ({"lora_alpha": 0}, ("lora_alpha: 0",)),
        ({"rslora_plus": True, "lora_alpha": 32}, ("lora_alpha: 32", "rslora_plus: true", "lora_alpha: 4")),
        ({"rslora_plus": True, "lora_plus_scale": 2}, ("lora_plus_scale: 2", "rslora_plus")),
        ({"rslora_plus": True, "rslora": False}, ("rslora: false", "rslora_plus")),
        ({"lora_init": "pissa", "dora": True}, ("lora_init: pissa", "dora: true")),
        ({"lora_init": "pissa", "compute_type": "wint8"}, ("lora_init: pissa", "compute_type: wint8")),
        ({"lora_init": "pissa", "lora_path": "x"}, ("lora_init: pissa", "lora_path: x")),
        ({"dora": True, "save_layout": "paddle"}, ("dora: true", "save_layout: paddle")),
    ],
)
def test_contradictions(given, names):
    with pytest.raises(ConfigError) as caught:
        load_config({"fine_tuning": "LoRA", **given})
    assert len(caught.value.problems) == 1
    assert all(name in str(caught.value) for name in names), str(caught.value)
    load_config({**given, "fine_tuning": "Full"})  # where adapters are not asked for, their keys exclude nothing


def test_what_agrees():
    load_config({"fine_tuning": "LoRA", "rslora_plus": True, "rslora": True, "lora_alpha": -1, "lora_plus_scale": 4})
    load_config({"fine_tuning": "LoRA", "freeze": ["layers.0"], "ema_decay": 0.9, "adaptive_norm_clip": True})
