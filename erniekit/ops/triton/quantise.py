"""FP8 quantisation: rows in blocks of 128, weights in blocks of 128 x 128, rows sent to their experts in the same pass,
rows along the tokens for a weight's gradient, and rotated rows under one given scale. The numbers are those of
ops/float8.py. Knows no layers; a block with NaN or infinity gets the scale NaN, since a kernel cannot raise.

Shapes: M tokens, C choices, T rows (M*C if routed), D numbers of a row, E experts, K and N of a weight, P rows if every
expert's are filled up to a multiple of 128. Not run on a GPU.
"""

from typing import Any

import triton
import triton.language as tl

from erniekit.ops.triton.device import (
    BLOCK,
    bytes_at,
    encode,
    magnitude_bits,
    numbers_at,
    reciprocal,
    scale_field,
    scale_of,
    tile_of,
)  # fmt: skip
from erniekit.ops.triton.launch import EXACT, cdiv, is_dense, is_whole, slots_for, strides

_ROWS, _WARPS = 32, 4  # rows and warps of a program


@triton.jit
def _quantised(v, AXIS: tl.constexpr, E5M2: tl.constexpr):
    """(codes, scales) of a tile, one scale for everything along AXIS."""
    amax = tl.max(magnitude_bits(v), AXIS)
    field = scale_field(amax, E5M2)
    return encode(v * tl.expand_dims(reciprocal(field), AXIS), E5M2), scale_of(amax, field)


@triton.jit
def _rows(
    x, codes, scales, places, rows, size, x_row, codes_row, scales_row, scales_block,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    v = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    code, scale = _quantised(v, 1, E5M2)
    for choice in tl.static_range(max(CHOICES, 1)):
        place = row
        if CHOICES:
            place = tl.load(places + row * CHOICES + choice, mask=row < rows, other=0).to(tl.int64)
        tl.store(bytes_at(codes) + place[:, None] * codes_row + column[None, :], code, mask=inside)
        tl.store(scales + place * scales_row + block * scales_block, scale, mask=row < rows)


@triton.jit
def _blocks(
    w, codes, turned, scales, high, wide, w_matrix, w_row, codes_matrix, codes_row, turned_matrix, turned_row,
    scales_matrix, scales_row, scales_column, TURNED: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = (row < high)[:, None] & (column < wide)[None, :]
    at = w + matrix * w_matrix + row[:, None] * w_row + column[None, :]
    v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude_bits(v), 1), 0)
    field = scale_field(amax, E5M2)
    code = encode(v * reciprocal(field), E5M2)
    tl.store(bytes_at(codes) + matrix * codes_matrix + row[:, None] * codes_row + column[None, :], code, mask=inside)
    if TURNED:
        at = bytes_at(turned) + matrix * turned_matrix + column[:, None] * turned_row + row[None, :]
        tl.store(at, tl.trans(code), mask=tl.trans(inside))
    at = scales + matrix * scales_matrix + tl.program_id(0) * scales_row + tl.program_id(1) * scales_column
    tl.store(at, scale_of(amax, field))


@triton.jit
def _columns(
    x, x_scales, codes, scales, ends, experts, size, x_row, x_scales_row, x_scales_block, codes_row, scales_row,
    FROM_CODES: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _, first, end = tile_of(block, ends, experts, SLOTS, BLOCK)
    if first >= end:
        return
    row = first.to(tl.int64) + tl.arange(0, BLOCK)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row < end)[:, None] & (column < size)[None, :]
    if FROM_CODES:
        at = numbers_at(x, False) + row[:, None] * x_row + column[None, :]
        v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        of = row * x_scales_row + (tl.program_id(1) * WIDE // BLOCK) * x_scales_block  # WIDE divides a block
        v = v * tl.load(x_scales + of, mask=row < end, other=0.0)[:, None]
    else:
        v = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    code, scale = _quantised(v, 0, E5M2)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = bytes_at(codes) + column[:, None].to(tl.int64) * codes_row + token[None, :]
    tl.store(at, tl.trans(code), mask=(column < size)[:, None])
    tl.store(scales + block.to(tl.int64) * scales_row + column, scale, mask=column < size)


@triton.jit
def _rotated(v, ROWS: tl.constexpr):
    """Every 32 neighbours of [ROWS, 128] times Sylvester's matrix, by butterflies: five times the lowest bit of the
    index is summed out and becomes the highest, so that at the end all bits are back in their places."""
    GROUPS: tl.constexpr = ROWS * 4
    for _ in tl.static_range(5):
        even, odd = tl.split(tl.reshape(v, [GROUPS, 16, 2]))
        v = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [GROUPS, 32])
    return tl.reshape(v, [ROWS, 128])


@triton.jit
def _hadamard(
    x, codes, scale, amax, rows, size, x_row, codes_row, QUANTISE: tl.constexpr, ROWS: tl.constexpr,
    E5M2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    v = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    v = _rotated(v, ROWS)
    if QUANTISE:
        v = tl.div_rn(v, tl.full(v.shape, 1.0, tl.float32) * tl.load(scale))  # `/` is off by an ulp or two
        tl.store(bytes_at(codes) + row[:, None] * codes_row + column[None, :], encode(v, E5M2), mask=inside)
    else:
        tl.atomic_max(amax, tl.max(tl.max(magnitude_bits(v), 1), 0))


def quantise_rows(x: Any, codes: Any, scales: Any, *, places: Any = None, e5m2: bool = False) -> None:
    """x [T, D] -> codes [T, D] and scales [T, ceil(D/128)] (any strides). With `places` [M, C], x is [M, D]: row m goes
    to each of the sorted rows places[m], read once and quantised once."""
    rows, size = x.shape
    if not rows:
        return
    assert is_dense(x, codes) and is_whole(places)
    _rows[(cdiv(rows, _ROWS), cdiv(size, 128))](
        x, codes, scales, places, rows, size, strides(x)[0], strides(codes)[0], *strides(scales),
        CHOICES=0 if places is None else places.shape[1], ROWS=_ROWS, E5M2=e5m2, num_warps=_WARPS, **EXACT,
    )  # fmt: skip


def quantise_blocks(w: Any, codes: Any, scales: Any, *, turned: Any = None, e5m2: bool = False) -> None:
    """Weights w [E, K, N] -> codes [E, K, N] and scales [E, ceil(K/128), ceil(N/128)]; `turned` [E, N, K] receives the
    same codes with K innermost, as the forward product wants them."""
    matrices, high, wide = w.shape
    assert is_dense(w, codes, turned)
    turned_strides = (0, 0) if turned is None else strides(turned)[:2]
    _blocks[(cdiv(high, 128), cdiv(wide, 128), matrices)](
        w, codes, turned, scales, high, wide, *strides(w)[:2], *strides(codes)[:2], *turned_strides, *strides(scales),
        TURNED=turned is not None, E5M2=e5m2, num_warps=8, **EXACT,
    )  # fmt: skip


def quantise_columns(
    x: Any, codes: Any, scales: Any, *, ends: Any, x_scales: Any = None, e5m2: bool = False
) -> None:
    """Rows x [T, D], sorted by expert, along the tokens: codes [D, P] with the tokens innermost and zeros between one
    expert's last row and the next multiple of 128, scales [P/128, D]. With `x_scales`, x holds E4M3 codes under these
    scales of rows. P may be any upper bound (`padded_rows`); what lies behind the last expert is left as it is."""
    experts, size = ends.shape[0], x.shape[1]
    assert is_dense(x, codes, scales) and is_whole(ends)
    x_scales_strides = (0, 0) if x_scales is None else strides(x_scales)
    _columns[(codes.shape[1] // 128, cdiv(size, 64))](
        x, x_scales, codes, scales, ends, experts, size, strides(x)[0], *x_scales_strides, strides(codes)[0],
        strides(scales)[0], FROM_CODES=x_scales is not None, SLOTS=slots_for(experts), WIDE=64, E5M2=e5m2, num_warps=8,
        **EXACT,
    )  # fmt: skip


def padded_rows(rows: int, experts: int) -> int:
    """Room for `rows` rows if each expert's are filled up to a multiple of 128, whatever the counts are."""
    return (cdiv(rows, 128) + experts) * 128


def rotate_quantise(x: Any, codes: Any, *, scale: Any, e5m2: bool = False) -> None:
    """x [T, D] rotated by Hadamard blocks of 32 and quantised under the one fp32 `scale` [1], clamped where it is too
    small: codes [T, D]."""
    _rotate(x, codes, scale=scale, amax=None, e5m2=e5m2)


def rotated_amax(x: Any, amax: Any) -> None:
    """Raises `amax` (int32 [1], the bits of a fp32 >= 0) to the largest magnitude of x [T, D] after the rotation."""
    _rotate(x, None, scale=None, amax=amax, e5m2=False)


def _rotate(x: Any, codes: Any, *, scale: Any, amax: Any, e5m2: bool) -> None:
    rows, size = x.shape
    assert is_dense(x, codes) and size % 32 == 0
    if not rows:
        return
    _hadamard[(cdiv(rows, _ROWS), cdiv(size, 128))](
        x, codes, scale, amax, rows, size, strides(x)[0], 0 if codes is None else strides(codes)[0],
        QUANTISE=codes is not None, ROWS=_ROWS, E5M2=e5m2, num_warps=_WARPS, **EXACT,
    )  # fmt: skip
