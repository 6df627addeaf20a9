"""What holds between the keys of adapters and other keys: contradictions, each naming both. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from erniekit.config.lora import PLUS_SCALE, RSLORA_ALPHA
from erniekit.config.model import QUANTISED
from erniekit.config.run import RunConfig
from erniekit.config.values import text_of

Finding = tuple[tuple[str, ...], str]

# What trains or moves weights of the base, and why that cannot be beside adapters.
_OF_THE_BASE = {
    "optim": (("muon",), "Muon moves whole weight matrices, not the thin factors of adapters; set optim to adamw"),
    "train_emb_only": ((1, True), "the base is frozen; set modules_to_save to [embed_tokens]"),
    "train_moe_only": ((1, True), "the base is frozen; set lora_target_modules to [experts]"),
    "mtp_init": (("random",), "the base is frozen, so a random block would stay random; set fine_tuning to Full"),
}


def adapters(config: RunConfig) -> Iterator[Finding]:
    """Every contradiction that adapters are part of."""
    if config.model.fine_tuning != "LoRA":
        return
    for name, (values, why) in _OF_THE_BASE.items():
        if config.value(name) in values:
            yield _both(config, name, "fine_tuning", why)
    lora = config.lora
    if lora.lora_alpha == 0:
        yield ("lora_alpha",), f"{_quote(config, 'lora_alpha')} scales adapters away; give a number above 0, or -1"
    if lora.rslora_plus:
        for name, value in (("rslora", True), ("lora_alpha", RSLORA_ALPHA), ("lora_plus_scale", PLUS_SCALE)):
            if config.given(name) and config.value(name) not in (value, -1):
                yield _both(config, name, "rslora_plus", f"which stands for {name}: {text_of(value)}; drop one of them")
    if lora.dora and config.train.save_layout == "paddle":
        why = "ERNIEKit, whose form the adapter would have, knows no DoRA; leave save_layout out"
        yield _both(config, "dora", "save_layout", why)
    if lora.lora_init == "pissa":
        if lora.dora:
            yield _both(config, "dora", "lora_init", "each starts from the base's weight in its own way; choose one")
        if config.model.compute_type in QUANTISED:
            why = "PiSSA takes singular vectors of weights that are not rounded; set lora_init to default"
            yield _both(config, "lora_init", "compute_type", why)
        if lora.lora_path:
            yield _both(config, "lora_init", "lora_path", "the adapter in that folder is the start; drop one of them")


def _both(config: RunConfig, name: str, other: str, why: str) -> Finding:
    return (name, other), f"{_quote(config, name)} and {_quote(config, other)} exclude each other: {why}"


def _quote(config: RunConfig, name: str) -> str:
    return f"{name}: {text_of(config.value(name))} ({config.origins[name]})"
