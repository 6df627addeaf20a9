"""What the kernels share: FP8 codes and power-of-two scales by arithmetic on bits, and which expert a tile belongs to.
Knows no layers and no tensors, only values in registers.

Why bits, where the chip can cast? One code path that is exact everywhere: Triton's interpreter (3.9) cuts bits off
where it should round, for FP8 and for bf16 alike, and casts of different chips differ at the edges. The arithmetic is
that of ops/arrays/float8.py, number for number. Quantisation waits for memory, not for these dozen integer operations.

Annotations are real objects in these files, because Triton reads them.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # numbers that share a scale, along a row, a column or both
_INFINITY, _QUIET_NAN, _MAGNITUDE = tl.constexpr(0x7F800000), tl.constexpr(0x7FC00000), tl.constexpr(0x7FFFFFFF)


@triton.jit
def magnitude_bits(v):
    """The bits of |v| as integers, which compare as the numbers do, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def scale_field(amax_bits, E5M2: tl.constexpr):
    """The exponent field of the smallest power of two by which a block fits; 127 (the scale 1) for zeros."""
    TOP: tl.constexpr = 15 if E5M2 else 8  # the largest number is 1.75 * 2^TOP
    field = ((amax_bits + 0x1FFFFF) >> 23) - TOP  # one more where the mantissa is above 1.75
    return tl.where(amax_bits == 0, 127, tl.maximum(field, 1))


@triton.jit
def scale_of(amax_bits, field):
    """The scale in fp32. A block with NaN or infinity has the scale NaN, so that its products show it."""
    return tl.where(amax_bits >= _INFINITY, _QUIET_NAN, field << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(field):
    """1 / scale, exactly."""
    return ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def encode(v, E5M2: tl.constexpr):
    """Codes (uint8) of fp32 numbers: clamped to the format, then to the nearest, to even from the middle."""
    LOST: tl.constexpr = 21 if E5M2 else 20  # bits of the mantissa that the format has not
    LARGEST: tl.constexpr = 0x47600000 if E5M2 else 0x43E00000
    LEAST_NORMAL: tl.constexpr = 0x38800000 if E5M2 else 0x3C800000
    REBIAS: tl.constexpr = (127 - 15) << 2 if E5M2 else (127 - 7) << 3
    HOME: tl.constexpr = 0x43000000 if E5M2 else 0x46800000  # fp32 numbers from here on are a subnormal step apart
    bits = v.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & _MAGNITUDE, LARGEST)
    normal = ((magnitude + ((1 << (LOST - 1)) - 1) + ((magnitude >> LOST) & 1)) >> LOST) - REBIAS
    home = tl.full(v.shape, HOME, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + home).to(tl.int32, bitcast=True) - HOME
    code = tl.where(magnitude < LEAST_NORMAL, subnormal, normal)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def as_bf16(v):
    """fp32 to bf16, to the nearest, to even from the middle; NaN stays NaN."""
    bits = v.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = tl.where((bits & _MAGNITUDE) > _INFINITY, (bits >> 16) | 0x40, rounded)
    return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stored_as(v, pointer):
    """fp32 values as what `pointer` points to: fp32 or bf16."""
    if pointer.dtype.element_ty == tl.bfloat16:
        v = as_bf16(v)
    return v


@triton.jit
def bytes_at(pointer):
    """A pointer to codes, for integers; codes may come as uint8 or as FP8."""
    return pointer.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def numbers_at(pointer, E5M2: tl.constexpr):
    """A pointer to codes, for numbers."""
    if E5M2:
        pointer = pointer.to(tl.pointer_type(tl.float8e5), bitcast=True)
    else:
        pointer = pointer.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    return pointer


@triton.jit
def tile_of(tile, ends, experts, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, its first row in this tile, its last row + 1): rows are sorted by expert, expert e's end before row
    ends[e], and each begins a new tile. Behind the last tile both rows are 0. SLOTS: a power of two, >= experts."""
    slot = tl.arange(0, SLOTS)
    end = tl.load(ends + slot, mask=slot < experts, other=0)
    start = tl.load(ends + slot - 1, mask=(slot > 0) & (slot < experts), other=0)
    tiles = tl.where(slot < experts, (end - start + (ROWS - 1)) // ROWS, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = slot == expert
    first = tl.sum(tl.where(mine, start + (tile - (upto - tiles)) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)
