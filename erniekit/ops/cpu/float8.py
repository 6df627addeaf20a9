"""FP8 numbers on their kernels (csrc/float8.cpp).

Shapes: T rows sorted by expert, D inputs, F outputs, E experts; else the last two dimensions are those of a matrix.
"""

from __future__ import annotations

import functools

import paddle

from erniekit.ops.arrays.float8 import Kind
from erniekit.ops.cpu.library import call
from erniekit.ops.wheel import has_bf16_products


def _scales(x: paddle.Tensor, counts: list[int], block: tuple[int, int]) -> paddle.Tensor:
    high, wide = block
    rows = sum(-(-count // high) for count in counts)
    stacked = [len(counts), rows // max(len(counts), 1)] if x.ndim == 3 else [rows]
    return paddle.empty([*stacked, -(-x.shape[-1] // wide)], "float32")


def quantise(
    x: paddle.Tensor, *, block: tuple[int, int], kind: Kind, counts: list[int], whole: bool,
    given: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor] | None:  # fmt: skip
    """(codes, scales), or None if x holds NaN or infinity. `whole`: a scale for each matrix."""
    codes, scales = paddle.empty(x.shape, "uint8"), _scales(x, counts, block)
    if given is not None:
        given = given.expand([len(counts)]).contiguous()
    sizes = (len(counts), x.shape[-1], *block, whole, kind.number)
    bad = call("float8_quantise", x.contiguous(), given, paddle.to_tensor(counts, "int64"), codes, scales, *sizes)
    return None if bad else (codes, scales)


def dense(
    codes: paddle.Tensor, scales: paddle.Tensor, *, block: tuple[int, int], kind: Kind, counts: list[int]
) -> paddle.Tensor:
    """The fp32 numbers that codes and scales stand for."""
    out = paddle.empty(codes.shape, "float32")
    sizes = (len(counts), codes.shape[-1], *block, kind.number)
    call("float8_dense", codes, scales, paddle.to_tensor(counts, "int64"), out, *sizes)
    return out


def finish_(
    x_TF: paddle.Tensor, factors: paddle.Tensor | None, *, counts: list[int], bf16: bool
) -> paddle.Tensor:  # fmt: skip
    """x times its part's factor, and rounded to bf16 numbers if they are wanted; in place."""
    if factors is not None or bf16:
        counts_E = paddle.to_tensor(counts, "int64")
        call("finish_products", x_TF, factors, counts_E, len(counts), x_TF.shape[-1], bf16)
    return x_TF


def bf16_numbers(x: paddle.Tensor) -> paddle.Tensor:
    """The nearest bf16 numbers."""
    made = x.clone().contiguous()
    call("finish_products", made, None, paddle.to_tensor([made.size], "int64"), 1, 1, True)
    return made


@functools.cache
def _halves() -> bool:
    """Whether operands go through bf16: of 4 significant bits times a power of two, it holds every one exactly."""
    return has_bf16_products()


def product(x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, *, counts: list[int], turned: bool) -> paddle.Tensor:
    """x @ weight_e of each expert's rows, or x @ weight_e^T if `turned`."""
    shape = weight_EDF.shape
    y_TF = paddle.empty([x_TD.shape[0], shape[1 if turned else 2]], "float32")
    counts_E, sizes = paddle.to_tensor(counts, "int64"), (*shape, _halves())
    if turned:
        call("grouped_linear_backward", None, weight_EDF, counts_E, x_TD, y_TF, None, *sizes)
    else:
        call("grouped_linear_forward", x_TD, weight_EDF, counts_E, y_TF, *sizes)
    return y_TF


def weight_product(x_TD: paddle.Tensor, grad_TF: paddle.Tensor, *, counts: list[int]) -> paddle.Tensor:
    """x^T @ grad of each expert's rows: [E, D, F]."""
    shape = [len(counts), x_TD.shape[1], grad_TF.shape[1]]
    grad_EDF, counts_E = paddle.empty(shape, "float32"), paddle.to_tensor(counts, "int64")
    call("grouped_linear_backward", x_TD, None, counts_E, grad_TF, None, grad_EDF, *shape, _halves())
    return grad_EDF
