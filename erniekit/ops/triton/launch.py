"""Reading tensors of any framework: what a launch needs to know of their shapes. Knows no kernels."""

from __future__ import annotations

from typing import Any

# Whether the compiler may round a product and its sum once: Triton's default is about to change (3.10). Products of
# scaled sums do; scales are powers of two, so their bits are the same. Elementwise kernels keep the twins' arithmetic.
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def strides(tensor: Any) -> tuple[int, ...]:
    """Elements from one index to the next, for every dimension: a method in torch, an attribute in Paddle."""
    found = tensor.stride() if callable(getattr(tensor, "stride", None)) else tensor.strides
    return tuple(found)


def is_dense(*tensors: Any) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory, as the kernels read them; None is nothing."""
    given = (t for t in tensors if t is not None)
    return all(0 in t.shape or t.shape[-1] == 1 or strides(t)[-1] == 1 for t in given)


def is_whole(*tensors: Any) -> bool:
    """Whether nothing lies between the rows either, for what kernels index without strides; None is nothing."""
    return all(t is None or t.is_contiguous() for t in tensors)


def cdiv(size: int, step: int) -> int:
    """Blocks of `step` that cover `size`."""
    return -(-size // step)


def slots_for(experts: int) -> int:
    """The power of two in which a kernel holds a number for every expert."""
    return 1 << max(experts - 1, 1).bit_length()
