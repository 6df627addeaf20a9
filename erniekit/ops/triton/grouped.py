"""Products of rows sorted by expert, each with its own expert's weight, in FP8 and in bf16, and the two products of
their backward pass. The plain twins are `product` and `weight_product` of ops/float8.py and the loops of
ops/grouped.py. Knows neither routers nor activations.

FP8: operands are codes under fp32 scales, of 1x128 numbers for rows and 128x128 for weights; a weight's gradient takes
both operands 1x128 along the tokens (`quantise_columns`). Tensor cores sum FP8 products with some 14 bits, so each 128
summands are a product of their own, scaled and added in fp32 registers. Hopper multiplies FP8 only if the summed
dimension is innermost in both operands: that is why a weight is kept twice, turned for the forward product.

A tile's shape never changes the order of a sum, so every setting below gives the same bits. Which of them is fastest
has to be measured (scripts/bench_kernels.py); the first is taken. Not run on a GPU.

Shapes: T rows, E experts, K inputs, N outputs, P rows with every expert's filled up to a multiple of 128.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from erniekit.ops.triton.device import BLOCK, numbers_at, stored_as, tile_of
from erniekit.ops.triton.launch import FUSED, cdiv, is_dense, is_whole, slots_for, strides


class Setting(NamedTuple):
    """How a product is cut into programs."""

    high: int = 128  # rows of a tile
    wide: int = 128  # columns of a tile
    warps: int = 8
    stages: int = 3  # tiles on their way from memory


# In FP8 a tile is as wide as a weight's block, so that its scale is one number.
FLOAT8 = (Setting(), Setting(stages=4), Setting(high=64, warps=4, stages=4))
BF16 = (Setting(), Setting(stages=4), Setting(wide=256), Setting(high=64, warps=4, stages=4))
_NEIGHBOURS = tl.constexpr(8)  # tiles one below the other that run together and share a weight in the L2 cache


@triton.jit
def _place(tiles_high, tiles_wide):
    """(tile of rows, tile of columns) of this program: 8 rows of tiles at a time, column by column."""
    program = tl.program_id(0)
    band = _NEIGHBOURS * tiles_wide
    top = program // band * _NEIGHBOURS
    high = tl.minimum(tiles_high - top, _NEIGHBOURS)
    return top + program % band % high, program % band // high


@triton.jit
def _product8(
    x, x_scales, w, w_scales, y, ends, experts, tiles_high, k_size, n_size, x_row, x_scales_row, x_scales_block,
    w_expert, w_column, w_scales_expert, w_scales_k, w_scales_n, y_row,
    SLOTS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, X_E5M2: tl.constexpr,
):  # fmt: skip
    tile, tile_n = _place(tiles_high, tl.cdiv(n_size, WIDE))
    expert, first, end = tile_of(tile, ends, experts, SLOTS, HIGH)
    if first >= end:
        return
    row = first.to(tl.int64) + tl.arange(0, HIGH)
    column = tile_n * WIDE + tl.arange(0, WIDE)
    k = tl.arange(0, BLOCK)
    at_x = numbers_at(x, X_E5M2) + row[:, None] * x_row + k[None, :]
    at_w = numbers_at(w, False) + expert.to(tl.int64) * w_expert + column[None, :].to(tl.int64) * w_column + k[:, None]
    at_x_scales = x_scales + row * x_scales_row
    at_w_scales = w_scales + expert.to(tl.int64) * w_scales_expert + tile_n * WIDE // BLOCK * w_scales_n
    rows_inside, columns_inside = (row < end)[:, None], (column < n_size)[None, :]
    total = tl.zeros([HIGH, WIDE], tl.float32)
    for block in range(tl.cdiv(k_size, BLOCK)):
        inside = k < k_size - block * BLOCK
        a = tl.load(at_x + block * BLOCK, mask=rows_inside & inside[None, :], other=0.0)
        b = tl.load(at_w + block * BLOCK, mask=inside[:, None] & columns_inside, other=0.0)
        scale = tl.load(at_x_scales + block * x_scales_block, mask=row < end, other=0.0)
        total += tl.dot(a, b) * (scale * tl.load(at_w_scales + block * w_scales_k))[:, None]
    tl.store(y + row[:, None] * y_row + column[None, :], stored_as(total, y), mask=rows_inside & columns_inside)


@triton.jit
def _weight_product8(
    x, x_scales, g, g_scales, out, ends, experts, k_size, n_size, x_column, x_scales_block, g_column, g_scales_block,
    out_expert, out_row, ADD: tl.constexpr, SLOTS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    G_E5M2: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tile_k, tile_n = _place(tl.cdiv(k_size, HIGH), tl.cdiv(n_size, WIDE))
    slot = tl.arange(0, SLOTS)
    end = tl.load(ends + slot, mask=slot < experts, other=0)
    start = tl.load(ends + slot - 1, mask=(slot > 0) & (slot < experts), other=0)
    blocks = tl.where(slot < experts, (end - start + (BLOCK - 1)) // BLOCK, 0)
    first_block = tl.sum(tl.where(slot < expert, blocks, 0), 0)
    last_block = first_block + tl.sum(tl.where(slot == expert, blocks, 0), 0)
    row = tile_k * HIGH + tl.arange(0, HIGH)
    column = tile_n * WIDE + tl.arange(0, WIDE)
    token = tl.arange(0, BLOCK)
    at_x = numbers_at(x, False) + row[:, None].to(tl.int64) * x_column + token[None, :]
    at_g = numbers_at(g, G_E5M2) + column[None, :].to(tl.int64) * g_column + token[:, None]
    rows_inside, columns_inside = row < k_size, column < n_size
    total = tl.zeros([HIGH, WIDE], tl.float32)
    for block in range(first_block, last_block):
        a = tl.load(at_x + block * BLOCK, mask=rows_inside[:, None], other=0.0)
        b = tl.load(at_g + block * BLOCK, mask=columns_inside[None, :], other=0.0)
        x_scale = tl.load(x_scales + block * x_scales_block + row, mask=rows_inside, other=0.0)
        g_scale = tl.load(g_scales + block * g_scales_block + column, mask=columns_inside, other=0.0)
        total += tl.dot(a, b) * x_scale[:, None] * g_scale[None, :]
    at_out = out + expert.to(tl.int64) * out_expert + row[:, None].to(tl.int64) * out_row + column[None, :]
    inside = rows_inside[:, None] & columns_inside[None, :]
    if ADD:
        total += tl.load(at_out, mask=inside, other=0.0)
    tl.store(at_out, total, mask=inside)


@triton.jit
def _product16(
    x, w, y, ends, experts, tiles_high, k_size, n_size, x_row, w_expert, w_k, w_column, y_row,
    SLOTS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    tile, tile_n = _place(tiles_high, tl.cdiv(n_size, WIDE))
    expert, first, end = tile_of(tile, ends, experts, SLOTS, HIGH)
    if first >= end:
        return
    row = first.to(tl.int64) + tl.arange(0, HIGH)
    column = tile_n * WIDE + tl.arange(0, WIDE).to(tl.int64)
    k = tl.arange(0, DEEP).to(tl.int64)
    at_x = x + row[:, None] * x_row + k[None, :]
    at_w = w + expert.to(tl.int64) * w_expert + k[:, None] * w_k + column[None, :] * w_column
    rows_inside, columns_inside = (row < end)[:, None], (column < n_size)[None, :]
    total = tl.zeros([HIGH, WIDE], tl.float32)
    for block in range(tl.cdiv(k_size, DEEP)):
        inside = k < k_size - block * DEEP
        a = tl.load(at_x, mask=rows_inside & inside[None, :], other=0.0)
        b = tl.load(at_w, mask=inside[:, None] & columns_inside, other=0.0)
        total = tl.dot(a, b, total)
        at_x += DEEP
        at_w += DEEP * w_k
    tl.store(y + row[:, None] * y_row + column[None, :], stored_as(total, y), mask=rows_inside & columns_inside)


@triton.jit
def _weight_product16(
    x, g, out, ends, k_size, n_size, x_row, g_row, out_expert, out_row,
    ADD: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tile_k, tile_n = _place(tl.cdiv(k_size, HIGH), tl.cdiv(n_size, WIDE))
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    row = tile_k * HIGH + tl.arange(0, HIGH)
    column = tile_n * WIDE + tl.arange(0, WIDE)
    rows_inside, columns_inside = row < k_size, column < n_size
    total = tl.zeros([HIGH, WIDE], tl.float32)
    for at in range(start, end, DEEP):
        token = (at + tl.arange(0, DEEP)).to(tl.int64)
        inside = (token < end)[:, None]
        a = tl.load(x + token[:, None] * x_row + row[None, :], mask=inside & rows_inside[None, :], other=0.0)
        b = tl.load(g + token[:, None] * g_row + column[None, :], mask=inside & columns_inside[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    at_out = out + expert.to(tl.int64) * out_expert + row[:, None].to(tl.int64) * out_row + column[None, :]
    inside = rows_inside[:, None] & columns_inside[None, :]
    if ADD:
        total += tl.load(at_out, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_out, stored_as(total, out), mask=inside)


def product8(
    x: tuple[Any, Any], w: tuple[Any, Any], y: Any, *, ends: Any, x_e5m2: bool = False, setting: Setting = FLOAT8[0]
) -> None:
    """y [T, N] (bf16 or fp32) = x @ w of each row's expert. x: codes [T, K] and scales [T, K/128]. w: E4M3 codes
    [E, N, K], K innermost, and scales [E, N/128, K/128]. Forward: the turned codes. dX = dY @ W^T: the codes as they
    lie, with what was called K and N changing places. ends (int32 [E]): the row behind each expert's last."""
    (codes, scales), (weight, weight_scales) = x, w
    (rows, size), (experts, wide, _) = codes.shape, weight.shape
    assert is_dense(codes, weight, y) and is_whole(ends) and setting.wide == 128
    tiles_high = cdiv(rows, setting.high) + experts
    w_expert, w_column, _ = strides(weight)
    scales_expert, scales_n, scales_k = strides(weight_scales)
    _product8[(tiles_high * cdiv(wide, setting.wide),)](
        codes, scales, weight, weight_scales, y, ends, experts, tiles_high, size, wide, strides(codes)[0],
        *strides(scales), w_expert, w_column, scales_expert, scales_k, scales_n, strides(y)[0], X_E5M2=x_e5m2,
        SLOTS=slots_for(experts), HIGH=setting.high, WIDE=setting.wide, num_warps=setting.warps,
        num_stages=setting.stages, **FUSED,
    )  # fmt: skip


def weight_product8(
    x: tuple[Any, Any], g: tuple[Any, Any], out: Any, *, ends: Any, add: bool = True, g_e5m2: bool = False,
    setting: Setting = FLOAT8[0],
) -> None:  # fmt: skip
    """out [E, K, N] (fp32) (+)= x^T @ g over each expert's rows; x and g as `quantise_columns` makes them: codes [K, P]
    and [N, P] with the tokens innermost, scales [P/128, K] and [P/128, N]."""
    (x_codes, x_scales), (g_codes, g_scales) = x, g
    experts, high, wide = out.shape
    assert is_dense(x_codes, x_scales, g_codes, g_scales, out) and is_whole(ends)
    _weight_product8[(cdiv(high, setting.high) * cdiv(wide, setting.wide), experts)](
        x_codes, x_scales, g_codes, g_scales, out, ends, experts, high, wide, strides(x_codes)[0],
        strides(x_scales)[0], strides(g_codes)[0], strides(g_scales)[0], *strides(out)[:2], ADD=add,
        SLOTS=slots_for(experts), HIGH=setting.high, WIDE=setting.wide, G_E5M2=g_e5m2, num_warps=setting.warps,
        num_stages=setting.stages, **FUSED,
    )  # fmt: skip


def product16(x: Any, w: Any, y: Any, *, ends: Any, turned: bool = False, setting: Setting = BF16[0]) -> None:
    """y [T, N] = x [T, K] @ w [E, K, N] of each row's expert, all bf16, summed in fp32; `turned`: w is [E, N, K]."""
    (rows, size), experts, wide = x.shape, w.shape[0], y.shape[1]
    assert is_dense(x, w, y) and is_whole(ends)
    tiles_high = cdiv(rows, setting.high) + experts
    w_expert, *inner = strides(w)
    w_k, w_column = inner[::-1] if turned else inner
    _product16[(tiles_high * cdiv(wide, setting.wide),)](
        x, w, y, ends, experts, tiles_high, size, wide, strides(x)[0], w_expert, w_k, w_column, strides(y)[0],
        SLOTS=slots_for(experts), HIGH=setting.high, WIDE=setting.wide, DEEP=64, num_warps=setting.warps,
        num_stages=setting.stages, **FUSED,
    )  # fmt: skip


def weight_product16(
    x: Any, g: Any, out: Any, *, ends: Any, add: bool = False, setting: Setting = BF16[0]
) -> None:
    """out [E, K, N] (fp32 or bf16) (+)= x^T @ g over each expert's rows; x [T, K] and g [T, N] in bf16."""
    experts, high, wide = out.shape
    assert is_dense(x, g, out) and is_whole(ends)
    _weight_product16[(cdiv(high, setting.high) * cdiv(wide, setting.wide), experts)](
        x, g, out, ends, high, wide, strides(x)[0], strides(g)[0], *strides(out)[:2],
        ADD=add, HIGH=setting.high, WIDE=setting.wide, DEEP=64, num_warps=setting.warps, num_stages=setting.stages,
        **FUSED,
    )  # fmt: skip
