"""The resolved configuration of a run: one section for each part of the program, and where every value came from.

A plain record. It reads no file and decides nothing; load.py makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from erniekit.config.align import AlignConfig
from erniekit.config.data import DataConfig
from erniekit.config.export import ExportConfig
from erniekit.config.generate import GenerateConfig
from erniekit.config.kernels import KernelConfig
from erniekit.config.keys import Alias, Key, keys_of
from erniekit.config.lora import LoraConfig
from erniekit.config.model import ModelConfig
from erniekit.config.optimizer import OptimizerConfig
from erniekit.config.parallel import ParallelConfig
from erniekit.config.precision import PrecisionConfig
from erniekit.config.serve import ServeConfig
from erniekit.config.train import TrainConfig
from erniekit.config.trainer import TrainerConfig
from erniekit.config.values import text_of
from erniekit.config.vision import VisionConfig
from erniekit.config.watch import WatchConfig

DEFAULT = "default"


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. `origins` says for each key where its value stands: "default", "run.yaml:7", ..."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    watch: WatchConfig
    parallel: ParallelConfig
    kernels: KernelConfig
    precision: PrecisionConfig
    lora: LoraConfig
    align: AlignConfig
    vision: VisionConfig
    generate: GenerateConfig
    export: ExportConfig
    serve: ServeConfig
    trainer: TrainerConfig
    origins: Mapping[str, str]
    notices: tuple[str, ...] = ()
    path: Path | None = None

    def value(self, name: str) -> Any:
        """The value of a key by its name."""
        return getattr(getattr(self, KEYS[name].section), name)

    def given(self, name: str) -> bool:
        """Whether the user set the key."""
        return not self.origins[name].startswith(DEFAULT)

    def has_effect(self, name: str) -> bool:
        """Whether the other settings leave the key something to decide."""
        return self.silenced_by(name) is None

    def silenced_by(self, name: str) -> str | None:
        """The key whose value leaves this one nothing to decide; None if it has an effect."""
        condition = KEYS[name].only
        if condition is None:
            return None
        deciding, values = condition
        return self.silenced_by(deciding) or (None if self.value(deciding) in values else deciding)

    def _told(self, key: Key) -> bool:
        """Whether another key decides what this one's default would."""
        return key.told_by is not None and bool(self.value(key.told_by))

    def flat(self) -> dict[str, Any]:
        """Every key and its value, passwords left out."""
        return {name: self.value(name) for name, key in KEYS.items() if not key.secret}

    def difference(self, other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(key, its value in `other`, its value here) for each key that may not change when a run is resumed."""
        return [
            (name, other.get(name, key.default), self.value(name))
            for name, key in KEYS.items()
            if key.fixed_on_resume and other.get(name, key.default) != self.value(name)
        ]

    def results_hash(self) -> str:
        """A digest of the keys that `difference` compares."""
        fixed = {name: self.value(name) for name, key in KEYS.items() if key.fixed_on_resume}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """The resolved configuration as a file that can be run again and needs no other file: what the user set, and
        every default that decides something."""
        lines = [f"# The resolved configuration of a run ({self.path or 'a Python call'}); it can be run again."]
        for section in SECTIONS:
            lines += ["", f"# {section}"]
            lines += [
                f"{name}: {text_of(self.value(name))}"
                for name, key in KEYS.items()
                if key.section == section and not key.secret
                and (self.origins[name] != DEFAULT or (key.built and self.has_effect(name) and not self._told(key)))
            ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def write_resolved(self, path: str | Path) -> None:
        """Write `text()` to a file."""
        from erniekit.base.files import atomic_write

        atomic_write(path, self.text().encode())


SECTIONS: dict[str, type] = {
    name: owner for name, owner in get_type_hints(RunConfig).items() if name not in ("origins", "notices", "path")
}
KEYS: dict[str, Key] = {
    name: key for section, owner in SECTIONS.items() for name, key in keys_of(section, owner).items()
}
ALIASES: dict[str, tuple[Key, Alias]] = {alias.name: (key, alias) for key in KEYS.values() for alias in key.aliases}
