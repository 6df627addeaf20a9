"""Loading into plain arrays, for tests that look at what lies in a model's memory without building one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from erniekit.checkpoint.ernie45 import CORRECTION_BIAS
from erniekit.checkpoint.folder import Folder, plan_load
from erniekit.checkpoint.source import fill
from erniekit.config.architecture import ErnieConfig


def load_into(
    folder: Folder, arrays: Mapping[str, np.ndarray], *, cfg: ErnieConfig, mtp_init: str | None = None
) -> None:
    """Fill arrays by the names of a model's weights; absent multi-token prediction weights are left as they are."""
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, tensor in plan_load(folder, shapes, cfg=cfg, mtp_init=mtp_init).items():
        if tensor is not None:
            fill(arrays[name], tensor, folder)
        elif name.endswith(CORRECTION_BIAS):
            arrays[name][...] = 0
