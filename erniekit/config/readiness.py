"""What a run asks for that this version or this machine does not have.

`check` lists it; `train` and the other verbs refuse it, all at once. Looks at files only to see whether they exist.
"""

from __future__ import annotations

import glob
import os

from erniekit.base import packages, resources
from erniekit.base.errors import CheckpointError, ConfigError, MeshError
from erniekit.base.files import nearest_sibling
from erniekit.config.architecture import ErnieConfig
from erniekit.config.data import is_data_set
from erniekit.config.families import family
from erniekit.config.hubs import DEFAULT_HUB, download_command, is_repository
from erniekit.config.keys import RESULTS
from erniekit.config.layout import layout_of
from erniekit.config.layout_rules import degrees_of, devices_text
from erniekit.config.model import REINFORCEMENT_STAGES, VISION_STAGES
from erniekit.config.parallel import DEVICE_DEGREES, UNBUILT_DEGREES
from erniekit.config.run import KEYS, RunConfig
from erniekit.config.values import text_of

_MODEL = ("model", "precision", "lora")
_READS = {
    "train": (*_MODEL, "data", "train", "watch", "optimizer", "parallel", "align", "vision", "trainer"),
    "eval": (*_MODEL, "data", "parallel", "generate"),
    "preview": ("data",),
    "chat": (*_MODEL, "generate"),
    "export": (*_MODEL, "export"),
}
_NEEDS = {
    "train": ("model_name_or_path", "train_dataset_path", "output_dir"),
    "eval": ("model_name_or_path", "eval_dataset_path"),
    "preview": ("model_name_or_path", "train_dataset_path"),
    "chat": ("model_name_or_path",),
    "export": ("output_dir",),
}
_FILES = {
    "train": ("model_name_or_path", "train_dataset_path", "eval_dataset_path", "canary_dataset_path",
              "resume_from_checkpoint", "lora_path"),
    "eval": ("model_name_or_path", "eval_dataset_path"),
    "preview": ("model_name_or_path", "train_dataset_path", "eval_dataset_path"),
    "chat": ("model_name_or_path",),
    "export": (),
}
_FEATURES = {
    "stage": {
        **dict.fromkeys(VISION_STAGES, "training on pictures and video"),
        **dict.fromkeys(REINFORCEMENT_STAGES, "reinforcement learning"),
    },
    "compute_type": {"fp16": "a loss scale"},
}  # fmt: skip


FP8_CAPABILITY = (9, 0)  # Hopper


def not_built(config: RunConfig) -> list[str]:
    """Settings that change results and that this version does not know how to follow."""
    return [_unbuilt_line(config, name) for name in _unbuilt(config, tuple(_READS))]


def require_built(config: RunConfig, verb: str = "train") -> None:
    """Raise ConfigError naming everything that `verb` would need and that is not built."""
    _refuse(_refused(config, verb))


def not_checked_here(config: RunConfig) -> list[str]:
    """What can only be judged where the run takes place: models to download, absent files, layouts for several
    devices."""
    return [*_repositories(config), *absent_files(config), *_degrees(config), *fp8_device(config)]


def absent_files(config: RunConfig, verb: str = "train") -> list[str]:
    """Every file or folder that the config names for `verb` and that is not there; a hub's model is fetched, not
    absent."""
    absent = []
    for name in _FILES[verb]:
        value, is_model = config.value(name), name == "model_name_or_path"
        for path in value if isinstance(value, list) else [value]:
            if path and not os.path.exists(path) and not (is_repository(path) if is_model else _stands_for_data(path)):
                way_out = _way_to_model(path, config.model.download_hub) if is_model else ""
                absent.append(f"{_place(config, name)}: '{path}' is not here.{nearest_sibling(path)}{way_out}")
    return absent


def _stands_for_data(path: str) -> bool:
    """Whether an entry that is no file stands for files: a pattern that some match, or the name of a data set."""
    matches = glob.has_magic(path) and glob.glob(path, recursive=True)
    return bool(matches) or is_data_set(path) or os.path.isdir(path.rpartition(":")[0])


def _repositories(config: RunConfig) -> list[str]:
    name, hub = config.model.model_name_or_path, config.model.download_hub
    if not name or not is_repository(name):
        return []
    return [
        f"{_place(config, 'model_name_or_path')}: '{name}' is not here; `train` downloads it from "
        f"{hub or DEFAULT_HUB}. Where there is no network: {download_command(hub, name, name)}"
    ]


def require_ready(config: RunConfig, verb: str = "train", *, world: int = 1, cards: int = 0) -> None:
    """Raise ConfigError naming everything that keeps `verb` from starting on `world` ranks: not built, not set, not
    there, degrees of another number of ranks or for another model."""
    found = [*_refused(config, verb), *_unset(config, verb), *absent_files(config, verb)]
    if verb == "train":
        found += fp8_device(config)
    if "parallel" in _READS[verb]:
        found += _misfits(config, world, verb=verb, cards=cards)
    _refuse(found)


def fp8_device(config: RunConfig) -> list[str]:
    """What this machine lacks of what FP8 needs; nothing where FP8 is emulated."""
    if config.model.compute_type != "fp8" or config.precision.fp8_emulate:
        return []
    build, found = packages.version("paddlepaddle-gpu"), resources.capabilities()
    if build and found and min(found) >= FP8_CAPABILITY:
        return []
    here = "no GPU" if not found else "a GPU that is older" if build else "a build of Paddle for CPUs"
    return [
        f"{_place(config, 'compute_type')}: fp8 needs GPUs that multiply FP8 (Hopper or newer) and a build of Paddle "
        f"for them; this machine has {here}. Set fp8_emulate: true: the same numbers on any device, slower."
    ]


def layout_problems(config: RunConfig) -> list[str]:
    """What no number of devices mends: degrees that contradict each other, or that the model cannot be cut by."""
    return _misfits(config, degrees_of(config).least_ranks)


def _misfits(config: RunConfig, world: int, *, verb: str = "train", cards: int = 0) -> list[str]:
    try:
        layout_of(config, world, architecture_here(config), verb=verb, cards=cards)
    except MeshError as error:
        return error.problems
    return []


def architecture_here(config: RunConfig) -> ErnieConfig | None:
    """The architecture of a model that is on this machine, or of the published family that a hub's name stands for;
    None of another one, or of one that cannot be read: who opens the folder says why."""
    name = config.model.model_name_or_path
    try:
        return family(name) if name and is_repository(name) else ErnieConfig.from_folder(name) if name else None
    except (CheckpointError, ConfigError):
        return None


def _refuse(lines: list[str]) -> None:
    if lines:
        raise ConfigError(lines)


def _refused(config: RunConfig, verb: str) -> list[str]:
    return [_unbuilt_line(config, name) for name in _unbuilt(config, (verb,))]


def _unset(config: RunConfig, verb: str) -> list[str]:
    return [
        f"{name} is not set; `{verb}` needs it. Write it into the file or add {name}=... to the command."
        for name in _NEEDS[verb]
        if config.value(name) is None and not (name == "eval_dataset_path" and config.data.has_eval_data)
    ]


def _unbuilt(config: RunConfig, verbs: tuple[str, ...]) -> list[str]:
    sections = {section for verb in verbs for section in _READS[verb]}
    return [
        name for name, key in KEYS.items()
        if key.effect == RESULTS and key.section in sections and key.lacks(config.value(name))
        and config.has_effect(name) and not _stands_for_more(config, name)
    ]  # fmt: skip


def _stands_for_more(config: RunConfig, name: str) -> bool:
    """Whether the key only details another one that is itself not built: naming that one is enough."""
    only = KEYS[name].only
    return only is not None and KEYS[only[0]].lacks(config.value(only[0]))


def _unbuilt_line(config: RunConfig, name: str) -> str:
    key, value = KEYS[name], config.value(name)
    if name in UNBUILT_DEGREES:
        what = UNBUILT_DEGREES[name]
        return f"{_place(config, name)}: {value} needs {what}, not built in this version. Set {name}=1."
    without = f"To go on without it, leave the key out or set it to {text_of(key.default)}."
    way_out = f"Built: {', '.join(key.choices)}." if key.choices else without
    feature = _FEATURES.get(name, {}).get(text_of(value))
    needs = f"needs {feature}, not built in this version" if feature else "needs a later version: not built in this one"
    return f"{_place(config, name)}: {text_of(value)} {needs}. {way_out}"


def _degrees(config: RunConfig) -> list[str]:
    found = [
        f"{_place(config, name)}: {config.value(name)} needs {config.value(name)} devices."
        for name in DEVICE_DEGREES
        if name not in UNBUILT_DEGREES and config.value(name) > 1
    ]
    together = devices_text(config, DEVICE_DEGREES)
    return [*found, f"devices in all: {together}."] if together else found


def _place(config: RunConfig, name: str) -> str:
    return f"{config.origins[name]}: {name}" if config.given(name) else name


def _way_to_model(model: str, hub: str | None) -> str:
    """How to get a model into the folder that was named."""
    folder = model.rstrip("/")
    name = folder.rpartition("/")[2]
    if name.startswith("ERNIE-4.5-"):
        return f" To download it: {download_command(hub, f'baidu/{name}', folder)}"
    command = download_command(hub, "baidu/ERNIE-4.5-0.3B-PT", folder)
    return f" Make one with `erniekit init`, or download one: {command}"
