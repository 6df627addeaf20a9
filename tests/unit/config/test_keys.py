"""The declarations themselves: complete against ERNIEKit's list, consistent, and honest about what is acted on."""

import re
from collections import Counter
from pathlib import Path

import pytest

from erniekit.config.keys import INERT, RESULTS, SPEED, keys_of, members
from erniekit.config.load import load_config
from erniekit.config.reader import read_file
from erniekit.config.readiness import not_built
from erniekit.config.run import ALIASES, KEYS, SECTIONS
from erniekit.config.values import is_nothing, parse

ROOT = Path(__file__).resolve().parents[3]
ERNIEKIT = {entry.name: entry.raw for entry in read_file(ROOT / "tests" / "data" / "erniekit_keys.txt")}
OWN = {  # ours, or of ERNIEKit versions after 1.3
    "cpu_bf16_matmul", "mtp_init", "mix_strategy", "packing", "allow_special_tokens_in_text", "save_layout",
    "resume_anyway", "steady_steps", "freeze", "train_only", "lr_multipliers", "ema_decay", "eval_generate",
    "system_prompt", "top_k", "split_multi_turn", "input_dir", "split", "columns",
    "early_stopping_patience", "early_stopping_threshold", "moe_health_steps", "spike_factor", "report_samples",
    "canary_dataset_path", "canary_dataset_type", "canary_max_increase",
    "validation_split", "max_dropped_fraction", "check_leaks", "cache_data", "data_cache_dir",
    "share_prompt",
    "lora_dropout", "lora_target_modules", "modules_to_save", "dora", "lora_init", "group_size",
    "fp8_recipe", "fp8_modules", "fp8_emulate", "fp8_check_every",
    "kto_desirable_weight", "kto_undesirable_weight", "merge_tolerance", "merge_proof",
}  # fmt: skip


def test_the_list_is_whole():
    assert len(ERNIEKIT) > 370


@pytest.mark.parametrize("name", ERNIEKIT)
def test_a_key_of_erniekit_loads_with_its_default(name):
    config = load_config({name: ERNIEKIT[name]})
    key = ALIASES[name][0] if name in ALIASES else KEYS[name]
    assert config.given(key.name) or is_nothing(ERNIEKIT[name]) or name in ("bf16", "fp16", "use_fp8", "offload_optim")
    assert not_built(config) == [] or name == "fine_tuning"  # which, asked for explicitly, needs what is not built


@pytest.mark.parametrize("name", [name for name in ERNIEKIT if name in KEYS])
def test_defaults_are_erniekits_unless_said(name):
    key = KEYS[name]
    if key.there is None:
        assert is_nothing(ERNIEKIT[name])
        return
    there = parse(ERNIEKIT[name], key.kind)
    if key.differs:
        assert parse(str(key.there), key.kind) == there != key.default
    else:
        assert key.default == there


def test_our_own_keys_are_known_to_be_ours():
    assert set(KEYS) - set(ERNIEKIT) == OWN
    assert set(ALIASES) <= set(ERNIEKIT)


def test_every_key_is_declared_once():
    names = Counter(name for section, owner in SECTIONS.items() for name in keys_of(section, owner))
    names.update(alias.name for key in KEYS.values() for alias in key.aliases)
    assert [name for name, count in names.items() if count > 1] == []
    assert "extends" not in names


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_a_declaration_is_sound(key):
    assert re.fullmatch(r".+[.)]", key.doc)
    assert key.effect in (RESULTS, SPEED, INERT)
    assert key.resume in ("fixed", "free")
    assert key.effect != INERT or not key.built
    assert not key.lacks(key.default), "a default must ask for nothing that is not built"
    if key.default is not None:
        assert type(key.default) in [getattr(kind, "__origin__", kind) for kind in members(key.kind)]
    else:
        assert type(None) in members(key.kind)
    if key.choices and key.default is not None:
        assert key.default in key.choices
    assert set(key.spellings.values()) <= {*key.choices, *key.later}
    if key.only:
        deciding, values = key.only
        known = (*KEYS[deciding].choices, *KEYS[deciding].later) or (True,)
        assert set(values) <= set(known)


def test_every_built_key_is_read_by_the_program():
    readers = ("fp8.py", "layout.py", "layout_rules.py", "preferences.py", "readiness.py", "rules.py")
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "erniekit").rglob("*.py")
        if path.parent.name != "config" or path.name in readers
    )
    unread = [name for name, key in KEYS.items() if key.built and not re.search(rf"\.{name}\b", sources)]
    assert unread == []
