"""What quantisation-aware training leaves for inference: codes with the run's scales, or the weights they stand for.

Both come from a checkpoint, which has the weights as they were trained, in fp32, and the scales of inputs. The result
of a run has them rounded to the model's format, and other codes would follow. Names are those of the -Paddle layout,
whose fused matrices have the scale that training gave them together. Knows files; how numbers are rounded is
precision/'s.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.chosen import numbered
from erniekit.checkpoint.convert import write_converted
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import SafetensorsFile
from erniekit.checkpoint.quantise import Statistics, write_quantised
from erniekit.checkpoint.quantised import Scheme
from erniekit.checkpoint.quantised_folder import QuantisedFolder
from erniekit.checkpoint.save import require_empty
from erniekit.config.fp8 import MODULES, Qat, fp8_of
from erniekit.config.run import RunConfig

_MEMORY, _SCALE = "training/memory.safetensors", "activation_scale/model."
_EXPERTS = re.compile(r"(?P<layer>.*\.experts)\.(?P<part>gate_up|down)_proj")
_STORED = {"gate_up": "up_gate_proj", "down": "down_proj"}


def trained_in_fp8(cfg: RunConfig) -> Qat | None:
    """The settings of a run of quantisation-aware training; None if the run is another. Raises ConfigError if it left
    modules out: a folder with codes has them for all."""
    settings = fp8_of(cfg)
    if settings is None or settings.qat is None:
        return None
    if missing := MODULES.keys() - set(settings.modules):
        raise ConfigError(
            f"fp8_modules: the run trained without {', '.join(sorted(missing))}, and FP8 folders have codes of all "
            "linear layers. Export the result as it is with compute_type=bf16."
        )
    return settings.qat


def trained_checkpoint(cfg: RunConfig, step: int | None) -> Folder:
    """The checkpoint of `step`, else the newest. Raises ConfigError if there is none with scales."""
    assert cfg.train.output_dir
    run = Path(cfg.train.output_dir)
    there = dict(numbered(run))
    path = there.get(max(there, default=0) if step is None else step)
    if path is None:
        raise ConfigError(
            f"output_dir {run} holds no checkpoint{'s' if step is None else f'-{step}'}: FP8 codes and scales are made "
            "from what a checkpoint holds, the weights as they were trained and the scales of inputs. Train with "
            "save_strategy: steps; the last step is always saved."
        )
    if step is None and cfg.watch.load_best_model_at_end:
        raise ConfigError("load_best_model_at_end: say which checkpoint is meant with --checkpoint STEP.")
    if not (path / _MEMORY).is_file():
        raise CheckpointError(f"{path}: holds no scales of inputs; it is no checkpoint of training in FP8.")
    return Folder.open(path)


def trained_scheme(folder: Folder, qat: Qat) -> Scheme:
    """How the codes of a checkpoint are made."""
    return Scheme.new("fp8", folder.disk_config).as_trained(rotated=qat.rotate)


def trained_scales(folder: Folder) -> Statistics:
    """The scales of inputs that a checkpoint holds."""
    file, scales, asleep = SafetensorsFile(folder.path / _MEMORY), dict[str, float](), list[str]()
    for key in file.tensors:
        if not key.startswith(_SCALE):
            continue
        name, found = key.removeprefix(_SCALE), np.array(file.read(key))
        if not found.all():
            asleep.append(name)
            found = np.where(found > 0, found, found.max() or 1.0)
        experts = _EXPERTS.fullmatch(name)
        if experts:
            path, own = experts["layer"], _STORED[experts["part"]]
            scales |= {f"ernie.{path}.{number}.{own}.weight": float(one) for number, one in enumerate(found)}
        else:
            scales[f"ernie.{name}.weight"] = float(found.item())
    if asleep:
        notice(
            f"{folder.path}: {asleep[0]}{f' and {len(asleep) - 1} others' if len(asleep) > 1 else ''} had no input in "
            "training for some experts; these get the largest scale of the others."
        )
    return Statistics(largest=scales)


def write_dequantised(
    target: Path, folder: Folder, qat: Qat, *, to: str, max_shard_bytes: int, progress: Callable[[int, int, str], None]
) -> None:
    """Write the weights that the codes stand for, in fp32, as an ordinary model: one that rounds no inputs gives what
    the trained model gives, up to the rounding of its inputs."""
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        codes = Path(scratch) / "codes"
        write_quantised(
            codes, folder, trained_scheme(folder, qat), source=folder, statistics=lambda: trained_scales(folder),
            identity={}, max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
        source = QuantisedFolder.open(codes)
        write_converted(target, folder, to=to, source=source, max_shard_bytes=max_shard_bytes)
