"""Triton's interpreter, on Paddle's CPU tensors: kernels run program by program in numpy.

Triton decides when it is imported whether it interprets, so this happens here, before any test module of this folder is
loaded. The interpreter would copy arguments as torch tensors; here they are in its reach already, so it takes pointers.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import paddle
import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

if importlib.util.find_spec("triton"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton
    triton.knobs.runtime.interpret = True
    from triton.runtime.interpreter import GridExecutor

    GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    GridExecutor._restore_args_dev = lambda self, *unused: None
