"""run.lock.yaml: all that a run was made of, so that it can be repeated and the repetition judged.

The resolved config, the content of its data and model files as hashes, packages, machine, and the loss of every step.
Writes, reads and compares; running is recipes/reproduce.py's.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erniekit.base.errors import ConfigError, listed
from erniekit.base.files import atomic_write, sha256
from erniekit.base.machine import commit, machine, packages
from erniekit.checkpoint.manifest import MANIFEST_FILE
from erniekit.config.run import RunConfig
from erniekit.version import __version__

LOCK_NAME = "run.lock.yaml"
_HEAD = "# What this run was made of. `erniekit reproduce {}` repeats it and compares the losses.\n"
_DATA_KEYS = ("train_dataset_path", "eval_dataset_path", "canary_dataset_path")
_WEIGHTS = (".safetensors", ".pdparams")
_CONFIGS = ("config.json", "adapter_config.json", "lora_config.json")


def lock_of(cfg: RunConfig, *, fingerprint: str, model: Path, ranks: int = 1) -> dict[str, Any]:
    """The lock of a run that begins, shared by so many ranks."""
    import yaml  # half of a run's start is imports already

    adapter = cfg.lora.lora_path if cfg.model.fine_tuning == "LoRA" else None
    return {
        "erniekit": {"version": __version__, "commit": commit() or None},
        "config": yaml.safe_load(cfg.text()),
        "ranks": ranks,
        "seeds": {"seed": cfg.train.seed, "step": "seed * 1000003 + step"},
        "data": {"fingerprint": fingerprint, "files": _hashes(data_files(cfg))},
        "model": {"path": str(model), "files": model_hashes(model, trust=True)},
        **({"adapter": {"path": adapter, "files": model_hashes(Path(adapter))}} if adapter else {}),
        "packages": packages(),
        "machine": machine(),
        "losses": [],
    }


def data_files(cfg: RunConfig) -> list[Path]:
    """The files that the data keys name; what is not a file here (a data set of a hub) is left to the fingerprint."""
    names = [name for key in _DATA_KEYS for name in cfg.value(key) or ()]
    found = [Path(path) for name in names for path in ([name] if Path(name).is_file() else sorted(glob.glob(name)))]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def model_hashes(folder: Path, *, trust: bool = False) -> dict[str, str]:
    """sha256 of config, tokenizer and weights; `trust` takes those of weights from a manifest that is no older."""
    known, manifest = {}, folder / MANIFEST_FILE
    if trust and manifest.is_file():
        written, files = manifest.stat().st_mtime, json.loads(manifest.read_bytes())["files"]
        weights = [folder / name for name in files if name.endswith(_WEIGHTS)]
        known = {p.name: files[p.name]["sha256"] for p in weights if p.is_file() and p.stat().st_mtime <= written}
    found = [p for p in sorted(folder.iterdir()) if p.suffix in (*_WEIGHTS, ".model") or p.name in _CONFIGS]
    return {p.name: known[p.name] if p.name in known else sha256(p) for p in found}


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    return {str(path): sha256(path) for path in paths}


def write_lock(path: Path, lock: Mapping[str, Any]) -> None:
    """Write the lock file."""
    import yaml

    text = yaml.safe_dump(dict(lock), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    atomic_write(path, (_HEAD.format(LOCK_NAME) + text).encode())


def finish_lock(path: Path, cfg: RunConfig, *, losses: Sequence[float], ranks: int = 1) -> None:
    """Add what came of the run to its lock; a resumed one may have been made longer, or gone on with other ranks."""
    import yaml

    write_lock(path, {**read_lock(path), "config": yaml.safe_load(cfg.text()), "ranks": ranks, "losses": list(losses)})


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock file; raises ConfigError if it is none."""
    import yaml

    path = path / LOCK_NAME if path.is_dir() else path
    try:
        lock = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). A run writes it into its output_dir.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    parts = {"config", "data", "model", "packages", "machine", "losses"}
    if not isinstance(lock, dict) or not parts <= lock.keys():
        raise ConfigError(f"{path}: is no lock file of a run; it lacks {', '.join(sorted(parts - set(lock or ())))}.")
    return lock


def place_of_repetition(lock: Mapping[str, Any], out: str | None) -> Path:
    """Where a run is repeated: `out`, or beside the old one."""
    return Path(out or f"{lock['config']['output_dir']}-reproduced")


def changed_files(lock: Mapping[str, Any]) -> list[str]:
    """What is not as it was: data and model files that are gone or have another content."""
    problems = []
    for name, digest in lock["data"]["files"].items():
        problems += _judge(Path(name), digest, sha256(name) if Path(name).is_file() else None)
    for part in filter(None, (lock["model"], lock.get("adapter"))):
        folder, then = Path(part["path"]), part["files"]
        now = model_hashes(folder) if folder.is_dir() else {}
        for name in sorted({*then, *now}):
            problems += _judge(folder / name, then.get(name), now.get(name))
    return problems


def _judge(path: Path, was: str | None, now: str | None) -> list[str]:
    if was == now:
        return []
    if now is None:
        return [f"{path}: is not here."]
    return [f"{path}: was not there then."] if was is None else [f"{path}: its content is another than then."]


def changed_surroundings(lock: Mapping[str, Any]) -> list[str]:
    """What else differs, and may change the last digits: packages, the program, the machine."""
    lines = []
    then, now = lock["packages"], packages()
    differing = [
        f"{name} {then.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted({*then, *now}, key=str.lower)
        if then.get(name) != now.get(name)
    ]
    if differing:
        lines.append(f"packages: {', '.join(listed(differing, limit=10))}")
    program = {"version": __version__, "commit": commit() or None}
    for title, old, new in (("erniekit", lock.get("erniekit", {}), program), ("machine", lock["machine"], machine())):
        lines += [
            f"{title}: {key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]
        ]
    return lines


def compare(then: Sequence[float], now: Sequence[float]) -> tuple[int, float]:
    """(steps that can be compared, largest difference of a loss as a share of the one then)."""
    pairs = list(zip(then, now, strict=False))
    worst = max((abs(a - b) / max(abs(a), 1e-9) if a != b else 0.0 for a, b in pairs), default=0.0)
    return len(pairs), math.inf if math.isnan(worst) else worst
