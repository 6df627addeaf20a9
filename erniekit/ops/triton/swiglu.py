"""The gated activation with the router's weight folded in, silu(gate) * up * weight, quantised as it is computed, and
its backward pass. (weight * a) @ w is weight * (a @ w), so experts whose activation carries the weight are summed
without one. The plain twins are weighted_gated of ops/mlp.py and quantise of ops/float8.py. Knows no products.

Shapes: T rows, I width; gate and up stand side by side in [T, 2I]. Not run on a GPU.
"""

from typing import Any

import triton
import triton.language as tl

from erniekit.ops.triton.device import (
    BLOCK,
    as_bf16,
    bytes_at,
    encode,
    magnitude_bits,
    reciprocal,
    scale_field,
    scale_of,
    stored_as,
)  # fmt: skip
from erniekit.ops.triton.launch import EXACT, cdiv, is_dense, is_whole, strides

_ROWS, _ROWS_BACKWARD = 32, 16


@triton.jit
def _store_quantised(v, codes, scales, row, column, block, codes_row, scales_row, scales_block, inside, rows):
    """A tile of rows, 128 wide, as E4M3 codes with a scale for each row."""
    amax = tl.max(magnitude_bits(v), 1)
    field = scale_field(amax, False)
    code = encode(v * reciprocal(field)[:, None], False)
    tl.store(bytes_at(codes) + row[:, None] * codes_row + column[None, :], code, mask=inside)
    tl.store(scales + row * scales_row + block * scales_block, scale_of(amax, field), mask=row < rows)


@triton.jit
def _forward(
    hidden, weights, codes, scales, rows, width, hidden_row, codes_row, scales_row, scales_block, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = hidden + row[:, None] * hidden_row + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)
    v = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    _store_quantised(v, codes, scales, row, column, block, codes_row, scales_row, scales_block, inside, rows)


@triton.jit
def _backward(
    hidden, weights, grad, grad_hidden, grad_weights, activated, codes, scales, rows, width, hidden_row, grad_row,
    grad_hidden_row, activated_row, codes_row, scales_row, scales_block, QUANTISE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    blocks = tl.cdiv(width, BLOCK)
    for block in range(blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = hidden + row[:, None] * hidden_row + column[None, :]
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigma
        of_weight += g * (silu * up)
        g = g * weight
        of_gate = g * up * (sigma + silu * (1.0 - sigma))
        of_up = g * silu
        at = grad_hidden + row[:, None] * grad_hidden_row + column[None, :]
        tl.store(at, stored_as(of_gate, grad_hidden), mask=inside)
        tl.store(at + width, stored_as(of_up, grad_hidden), mask=inside)
        at = activated + row[:, None] * activated_row + column[None, :]
        tl.store(at, stored_as(silu * up * weight, activated), mask=inside)
        if QUANTISE:
            _store_quantised(
                as_bf16(of_gate).to(tl.float32), codes, scales, row, column, block, codes_row, scales_row,
                scales_block, inside, rows,
            )  # fmt: skip
            _store_quantised(
                as_bf16(of_up).to(tl.float32), codes, scales, row, column + width, block + blocks, codes_row,
                scales_row, scales_block, inside, rows,
            )  # fmt: skip
    tl.store(grad_weights + row, tl.sum(of_weight, 1), mask=row < rows)


def weighted_swiglu(hidden: Any, weights: Any, codes: Any, scales: Any) -> None:
    """hidden [T, 2I] and weights [T] -> E4M3 codes [T, I] and scales [T, ceil(I/128)] of silu(gate) * up * weight."""
    rows, width = hidden.shape[0], hidden.shape[1] // 2
    assert is_dense(hidden, codes) and is_whole(weights)
    if not rows:
        return
    _forward[(cdiv(rows, _ROWS), cdiv(width, 128))](
        hidden, weights, codes, scales, rows, width, strides(hidden)[0], strides(codes)[0], *strides(scales),
        ROWS=_ROWS, num_warps=4, **EXACT,
    )  # fmt: skip


def weighted_swiglu_backward(
    hidden: Any, weights: Any, grad: Any, *, grad_hidden: Any, grad_weights: Any, activated: Any, codes: Any = None,
    scales: Any = None,
) -> None:  # fmt: skip
    """From the gradient [T, I] of the weighted activation: grad_hidden [T, 2I] and activated [T, I] (bf16 or fp32; the
    weighted activation again, which the gradient of the next weight needs) and grad_weights [T] (fp32). With `codes`
    [T, 2I] and `scales` [T, 2I/128], grad_hidden also comes quantised in rows, from its bf16 numbers."""
    rows, width = hidden.shape[0], hidden.shape[1] // 2
    assert is_dense(hidden, grad, grad_hidden, activated, codes) and is_whole(weights, grad_weights)
    assert codes is None or width % 128 == 0, "a block of 128 must not hold both gates and ups"
    if not rows:
        return
    quantised_strides = (0, 0, 0) if codes is None else (strides(codes)[0], *strides(scales))
    _backward[(cdiv(rows, _ROWS_BACKWARD),)](
        hidden, weights, grad, grad_hidden, grad_weights, activated, codes, scales, rows, width, strides(hidden)[0],
        strides(grad)[0], strides(grad_hidden)[0], strides(activated)[0], *quantised_strides,
        QUANTISE=codes is not None, ROWS=_ROWS_BACKWARD, num_warps=4, **EXACT,
    )  # fmt: skip
