"""The casts and products of float8.py on a GPU of Hopper's kind, by Paddle's own kernels.

Not run: there was no such GPU with Paddle at hand. What the signatures and docstrings of Paddle 3.3.1 say was followed:
casts read bf16; products take b as [N, K], and scales along rows as [K / 128, M]. Between our functions codes are
uint8, which views make E4M3. Rows are filled up with zeros where kernels want a multiple. What has no kernel in that
wheel (given scales, E5M2, other blocks) stays with the plain twin.
Shapes: T rows sorted by expert, D inputs, F outputs, E experts; M, N, K of a product.
"""

from __future__ import annotations

from typing import NamedTuple

import paddle
from paddle.incubate.nn import functional as kernels

from erniekit.ops.arrays.float8 import E4M3, Blocks, Columns, Kind, Rows, Scheme
from erniekit.ops.grouped import rows_of_experts

_SIZE = 128  # of the kernels' blocks
_ROWS, _COLUMNS, _SQUARES = Rows(_SIZE), Columns(_SIZE), Blocks(_SIZE, _SIZE)
_METHODS: dict[Scheme, str] = {_ROWS: "1x128", _SQUARES: "128x128"}
_FEWEST = 16  # rows of a product come in multiples of this

Held = tuple[paddle.Tensor, paddle.Tensor]  # codes and scales


class _Operand(NamedTuple):
    """A matrix whose rows are those of the result and whose columns are what a product sums over."""

    codes: paddle.Tensor  # uint8 [M, K]
    scales: paddle.Tensor  # fp32 [M, K / 128], of squares [M / 128, K / 128]
    by_rows: bool


def casts(scheme: Scheme, kind: Kind, shape: list[int]) -> bool:
    """Whether a kernel makes this cast."""
    whole = shape[-1] % _SIZE == 0 and (scheme == _ROWS or shape[-2] % _SIZE == 0)
    return kind is E4M3 and scheme in _METHODS and whole and 0 not in shape


def quantise(x: paddle.Tensor, scheme: Scheme) -> Held:
    """Codes and scales of a finite matrix, or of a stack of them."""
    made = [
        kernels.fp8_quant_blockwise(
            matrix.astype("bfloat16"), output_scale_transpose=False, quant_method=_METHODS[scheme]
        )
        for matrix in (x if x.ndim == 3 else [x])
    ]
    codes, scales = [codes.view("uint8") for codes, _ in made], [scales for _, scales in made]
    return (paddle.stack(codes), paddle.stack(scales)) if x.ndim == 3 else (codes[0], scales[0])


def multiplies(left: Scheme, right: Scheme, num_in: int, num_out: int) -> bool:
    """Whether a kernel makes the product of matrices with these schemes."""
    schemes = (left, right) in ((_ROWS, _SQUARES), (_COLUMNS, _COLUMNS))
    return schemes and num_in % _SIZE == 0 and num_out % _SIZE == 0


def product(x: Held, weight: Held, *, counts: list[int], turned: bool, dtype: str) -> paddle.Tensor:
    """Rows [T, D] times their expert's weight of [E, D, F], or times its transpose."""
    parts = []
    for expert, rows in rows_of_experts(counts):
        codes, scales = (held[expert] if turned else held[expert].T.contiguous() for held in weight)
        left = _Operand(_filled_up(x[0][rows], _FEWEST), _filled_up(x[1][rows], _FEWEST), by_rows=True)
        made = _multiplied(left, _Operand(codes, scales, by_rows=False), dtype)
        parts.append(made[: rows.stop - rows.start])
    width = weight[0].shape[1 if turned else 2]
    return paddle.concat(parts) if parts else paddle.zeros([0, width], dtype)


def weight_product(x: Held, grad: Held, *, counts: list[int]) -> paddle.Tensor:
    """x^T grad of each expert's rows in fp32, [E, D, F]; both in blocks along the rows."""
    made = paddle.zeros([len(counts), x[0].shape[1], grad[0].shape[1]])
    first = 0  # of an expert's scales
    for expert, rows in rows_of_experts(counts):
        stop = first - (rows.start - rows.stop) // _SIZE  # rounded up
        left, right = (_along_rows(codes[rows], scales[first:stop]) for codes, scales in (x, grad))
        made[expert] = _multiplied(left, right, "float32")
        first = stop
    return made


def _multiplied(a: _Operand, b: _Operand, dtype: str) -> paddle.Tensor:
    """a [M, K] times the transpose of b [N, K]: [M, N]."""
    return kernels.fp8.fp8_gemm_blockwise(
        a.codes.view(E4M3.name), a.scales.T.contiguous(),
        b.codes.view(E4M3.name), b.scales.T.contiguous() if b.by_rows else b.scales,
        dtype, is_a_1d_scaled=a.by_rows, is_b_1d_scaled=b.by_rows,
    )  # fmt: skip


def _along_rows(codes_TD: paddle.Tensor, scales_GD: paddle.Tensor) -> _Operand:
    """A matrix turned, so that a kernel finds its tokens along rows, in whole blocks."""
    return _Operand(_filled_up(codes_TD, _SIZE).T.contiguous(), scales_GD.T.contiguous(), by_rows=True)


def _filled_up(x_TD: paddle.Tensor, size: int) -> paddle.Tensor:
    """With rows of zeros, up to a multiple of `size`. 0 is the code of 0."""
    missing = -x_TD.shape[0] % size
    return paddle.concat([x_TD, paddle.zeros([missing, x_TD.shape[1]], x_TD.dtype)]) if missing else x_TD.contiguous()
