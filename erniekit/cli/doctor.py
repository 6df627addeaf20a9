"""The verb `doctor`: what on this machine keeps a run from starting or makes it slow, each with its cure.

Reads records of packages and files of the system; imports none of the packages.
"""

from __future__ import annotations

import importlib.util
import locale
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from erniekit.base import packages, resources, runtime
from erniekit.base.errors import ErnieKitError
from erniekit.base.resources import GIB
from erniekit.cli.arguments import Arguments
from erniekit.config.load import load_config
from erniekit.config.readiness import fp8_device
from erniekit.config.run import RunConfig

if TYPE_CHECKING:
    from erniekit.training.budget import Budget

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_PYTHON = ((3, 10), (3, 13))
_PADDLE = ((3, 2), (3, 4))  # from, below
_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580,)}  # CUDA -> the oldest driver that runs it
_LITTLE_DISK, _LITTLE_MEMORY = 5 * GIB, 2 * GIB
# Packages that a run or an export meets: ours, what we require, and what people install beside it.
_RELEVANT = (
    "erniekit-paddle", "paddlepaddle", "paddlepaddle-gpu", "numpy", "pyarrow", "datasets", "protobuf", "sentencepiece",
    "safetensors", "ml_dtypes", "jinja2", "pyyaml", "orjson", "tqdm", "tensorboard", "tensorboardX", "setuptools",
    "paddlenlp", "paddleformers", "aistudio-sdk", "modelscope", "huggingface_hub", "transformers", "tokenizers",
    "torch", "peft", "trl", "visualdl", "wandb", "swanlab", "rouge-score", "fastdeploy-gpu", "vllm",
)  # fmt: skip
_REQUIRED = ("numpy", "pyyaml", "sentencepiece", "safetensors", "tqdm", "orjson", "ml_dtypes", "jinja2")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `cure` is a line to run or to change."""

    level: str
    subject: str
    text: str
    cure: str = ""


def doctor(arguments: Arguments) -> None:
    """Print what was found; raises ErnieKitError if anything is a problem."""
    config = load_config(arguments.places[0], arguments.overrides) if arguments.places else None
    problems = 0
    for finding in _findings(config):
        problems += finding.level == PROBLEM
        print(f"{finding.level:8} {finding.subject:10} {finding.text}")
        if finding.cure:
            print(f"{'':19} cure: {finding.cure}")
    if problems:
        raise ErnieKitError(f"{problems} problem(s) found; each cure stands above.")


def _findings(config: RunConfig | None) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    yield from _paddle()
    yield from _gpu()
    yield from _threads()
    yield _memory()
    yield _compiler()
    yield _text()
    yield from _disk(config)
    if config is not None:
        yield from _run(config)


# ---------------------------------------------------------------------- software
def _python() -> Finding:
    found, text = sys.version_info[:2], f"Python {sys.version.split()[0]}"
    if _PYTHON[0] <= found <= _PYTHON[1]:
        return Finding(OK, "python", text)
    return Finding(WARNING, "python", f"{text} is not tested", "use Python 3.10 to 3.13")


def _packages() -> Iterator[Finding]:
    absent = [name for name in _REQUIRED if packages.version(name) is None]
    if absent:
        yield Finding(PROBLEM, "packages", f"{', '.join(absent)}: not installed", f"pip install {' '.join(absent)}")
    if importlib.util.find_spec("packaging") is None:
        yield Finding(WARNING, "packages", "requirements cannot be read without `packaging`", "pip install packaging")
        return
    clashes = packages.clashes(_RELEVANT)
    yield from (Finding(PROBLEM, "packages", clash.text, clash.cure) for clash in clashes)
    if not clashes and not absent:
        count = sum(packages.version(name) is not None for name in _RELEVANT)
        yield Finding(OK, "packages", f"{count} that matter here, with their requirements")


def _paddle() -> Iterator[Finding]:
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        installed = packages.version(name)
        if installed is None:
            continue
        numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
        if _PADDLE[0] <= numbers < _PADDLE[1]:
            yield Finding(OK, "paddle", f"{name} {installed}")
        else:
            yield Finding(PROBLEM, "paddle", f"{name} {installed} is not supported", f"pip install '{name}>=3.2,<3.4'")
    if not (packages.version("paddlepaddle") or packages.version("paddlepaddle-gpu")):
        yield Finding(
            PROBLEM, "paddle", "PaddlePaddle is not installed",
            "pip install 'erniekit-paddle[cpu]'; for a GPU see README.md",
        )  # fmt: skip


def _compiler() -> Finding:
    if shutil.which("g++"):
        return Finding(OK, "compiler", "g++ for the fast CPU kernels")
    return Finding(WARNING, "compiler", "no g++: on a CPU training takes about twice the time", "apt install g++")


def _text() -> Finding:
    encodings = {locale.getpreferredencoding(False), sys.stdout.encoding or ""}
    if all(re.sub(r"[^a-z0-9]", "", name.lower()) == "utf8" for name in encodings):
        return Finding(OK, "text", "UTF-8")
    return Finding(
        WARNING, "text", f"the terminal's encoding is {'/'.join(sorted(encodings))}: Chinese text may not be shown",
        "export PYTHONUTF8=1 LANG=C.UTF-8",
    )  # fmt: skip


# ---------------------------------------------------------------------- the machine
def _gpu() -> Iterator[Finding]:
    driver, found, cuda = resources.driver(), resources.gpus(), _cuda()
    for gpu in found:
        yield Finding(OK, "gpu", f"{gpu.name}, {gpu.num_bytes / GIB:.0f} GiB")
    if cuda is None:
        if driver or found:
            yield Finding(
                WARNING, "gpu", "there is a GPU, and this Paddle computes on the CPU only",
                "install paddlepaddle-gpu for your CUDA version (README.md)",
            )  # fmt: skip
        return
    if driver is None:
        yield Finding(
            PROBLEM, "gpu", f"paddlepaddle-gpu (CUDA {cuda}) is installed, and no NVIDIA driver is loaded",
            "install the driver; or pip uninstall paddlepaddle-gpu && pip install paddlepaddle",
        )  # fmt: skip
    elif driver < _DRIVERS.get(cuda, ()):
        wanted = ".".join(map(str, _DRIVERS[cuda]))
        yield Finding(
            PROBLEM, "gpu", f"driver {'.'.join(map(str, driver))} is too old for CUDA {cuda}",
            f"update the driver to {wanted} or newer, or install a paddlepaddle-gpu for an older CUDA",
        )  # fmt: skip
    else:
        yield Finding(OK, "gpu", f"driver {'.'.join(map(str, driver))} for CUDA {cuda}")


def _cuda() -> int | None:
    """The CUDA version that the installed paddlepaddle-gpu was built for, 0 if it does not say; None without it."""
    if packages.version("paddlepaddle-gpu") is None:
        return None
    wanted = " ".join(metadata.requires("paddlepaddle-gpu") or ())
    found = re.search(r"-cu(\d\d)\b", wanted)
    return int(found[1]) if found else 0


def _threads() -> Iterator[Finding]:
    cores, settings, quota = runtime.num_cores(), runtime.settings(), resources.quota()
    if quota is not None and quota < cores:
        yield Finding(
            WARNING, "threads", f"{cores} cores are seen and {quota:g} may be kept busy",
            f"export MKL_NUM_THREADS={max(int(quota), 1)}",
        )  # fmt: skip
    many = settings.get("OMP_NUM_THREADS", "1")
    if many != "1":
        yield Finding(
            WARNING, "threads", f"OMP_NUM_THREADS={many}: two thread pools slow each other down three to five times",
            "unset OMP_NUM_THREADS, or set it to 1",
        )  # fmt: skip
    wanted = settings.get("MKL_NUM_THREADS", str(cores))
    if wanted.isdecimal() and int(wanted) > cores:
        yield Finding(
            WARNING, "threads", f"MKL_NUM_THREADS={wanted} on {cores} core(s)", f"export MKL_NUM_THREADS={cores}"
        )
    yield Finding(OK, "threads", f"{wanted} on {cores} core(s)")


def _memory() -> Finding:
    total, free = resources.memory()
    text = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < _LITTLE_MEMORY:
        return Finding(WARNING, "memory", f"{text}: little for training", "stop other programs")
    return Finding(OK, "memory", text)


def _disk(config: RunConfig | None) -> Iterator[Finding]:
    out = (config.train.output_dir if config else None) or "."
    for subject, path in (("output", out), ("cache", runtime.cache_folder())):
        free, writable = resources.free_disk(path)
        text = f"{path}: {free / GIB:.1f} GiB free"
        if not writable:
            yield Finding(PROBLEM, subject, f"{path}: cannot be written", "choose another folder or its permissions")
        elif free < _LITTLE_DISK:
            yield Finding(WARNING, subject, f"{text}: little for checkpoints", "free space, or choose another disk")
        else:
            yield Finding(OK, subject, text)


# ---------------------------------------------------------------------- one run on it
def _run(config: RunConfig) -> Iterator[Finding]:
    from erniekit.training.budget import architecture_of, disk_of, run_budget  # here: numpy may be what is broken

    for text in fp8_device(config):
        yield Finding(PROBLEM, "run", text, "fp8_emulate=true, or a GPU that multiplies FP8")
    arch = architecture_of(config)
    if arch is None:
        yield Finding(
            WARNING, "run", f"the size of '{config.model.model_name_or_path}' is not known",
            "give a model folder with config.json, or a published name",
        )  # fmt: skip
        return
    if arch.is_vl:
        yield Finding(WARNING, "run", "vision-language models cannot be trained yet", "choose a text model")
        return
    gpus = resources.gpus() if packages.version("paddlepaddle-gpu") else []
    needed = run_budget(config, arch, on_gpu=bool(gpus))
    yield _memory_of(needed, max(gpu.num_bytes for gpu in gpus) if gpus else resources.memory()[1], on_gpu=bool(gpus))
    yield _disk_of(*disk_of(config, arch, needed), config)


def _memory_of(needed: Budget, offered: int, *, on_gpu: bool) -> Finding:
    total = needed.peak + needed.kernels
    text = (
        f"{needed.numbers / 1e9:.2f} billion parameters: {total / GIB:.1f} GiB at most at once for weights "
        f"({needed.weights / GIB:.1f}), gradients ({needed.gradients / GIB:.1f}), optimizer states "
        f"({needed.states / GIB:.1f}) and activations of full rows ({needed.activations / GIB:.1f}); "
        f"{offered / GIB:.1f} GiB {'on the GPU' if on_gpu else 'of memory free'}"
    )
    cure = "recompute=true, a smaller max_seq_len or batch_size, fine_tuning=LoRA; or a smaller model, a larger machine"
    if total > offered:
        return Finding(PROBLEM, "run", text, cure)
    return Finding(WARNING, "run", text, cure) if total > 0.8 * offered else Finding(OK, "run", text)


def _disk_of(checkpoint: int, model: int, config: RunConfig) -> Finding:
    train = config.train
    kept = 0 if train.save_strategy == "no" else (train.save_total_limit or 0) + 1
    total = kept * checkpoint + model
    free, _ = resources.free_disk(train.output_dir or ".")
    every = "every checkpoint is kept" if kept == 1 else f"at most {kept} at a time"
    text = f"{checkpoint / GIB:.1f} GiB for a checkpoint ({every}), {model / GIB:.1f} for the model"
    if total > free:
        cure = "save_total_limit=1, or another output_dir"
        return Finding(PROBLEM, "run", f"{text}; {free / GIB:.1f} GiB free", cure)
    return Finding(OK, "run", text)
