"""Train ERNIE 4.5 models with PaddlePaddle. Importing this loads nothing heavy; each function brings what it needs."""

from __future__ import annotations

from erniekit.version import __version__

TYPE_CHECKING = False  # typing's own costs milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

_HOMES = {
    "Sampling": "erniekit.rollout.sampling:Sampling",
    "generate": "erniekit.rollout.generate:generate",
    "load_model": "erniekit.checkpoint.load:load_model",
    "load_tokenizer": "erniekit.data.tokenizer:Tokenizer.from_folder",
    "save_model": "erniekit.checkpoint.model_io:save_model",
    "train": "erniekit.recipes:train",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'erniekit' has no attribute '{name}'")
    from importlib import import_module

    from erniekit.base import runtime

    runtime.prepare()  # before paddle is loaded
    module, path = _HOMES[name].split(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
