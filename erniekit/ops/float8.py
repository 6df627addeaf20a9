"""FP8 numbers: quantised, dense again, and multiplied. Knows neither layers nor when to use them.

A matrix [R, C], or a stack of them [E, R, C] each by itself, becomes codes of one byte and a scale for every block
(arrays/float8.py says how scales are made and blocks cut). With `counts`, the rows of a matrix are sorted by expert,
and blocks of several rows begin anew with every expert.

The cast is treacherous: Paddle 3.3.1 on a CPU makes NaN of E4M3's 464 to 480, and 448 of NaN and infinity. So numbers
are tested for finiteness and clamped before every cast; within the range all casts agree bit for bit (to nearest, to
even from the middle, subnormals too). Clamping can only happen where the caller brings its own scale.

A product multiplies the dense operands and sums in fp32. Numbers of 4 significant bits times a power of two are bf16
numbers, so processors that multiply bf16 do so without another rounding. Results are rounded to bf16, as the GPU's
kernels give them, except for a weight's gradient, which is added up in fp32.
Shapes: T rows (tokens), D inputs, F outputs, E experts, R rows, C columns, G blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import paddle
import paddle.nn.functional as F

from erniekit.base.errors import NotFinite
from erniekit.ops import float8_gpu
from erniekit.ops.arrays.float8 import (
    BIAS,
    E4M3,
    E5M2,
    MANTISSA,
    THREE_QUARTERS,
    Blocks,
    Columns,
    Kind,
    Rows,
    Scheme,
    Tensor,
)
from erniekit.ops.cpu import float8 as cpu
from erniekit.ops.dispatch import backend
from erniekit.ops.grouped import rows_of_experts

__all__ = [
    "E4M3", "E5M2", "Blocks", "Columns", "Float8", "Kind", "Rows", "Scheme", "Statistics", "Tensor", "bf16_numbers",
    "dense", "has_float8", "power_of_two", "product", "quantise", "quantise_or_nan", "rounded", "statistics",
    "weight_product",
]  # fmt: skip

Result = Literal["bf16", "fp32"]  # which numbers a product is made of, however they are stored
_NAN = 0x7F  # its code in both formats


@dataclass(frozen=True)
class Float8:
    """A quantised matrix or stack of matrices."""

    codes: paddle.Tensor  # uint8, [R, C] or [E, R, C]
    scales: paddle.Tensor  # fp32, [G, G] or [E, G, G]; with counts, the blocks of all experts one below the other
    scheme: Scheme
    kind: Kind
    counts: list[int]  # rows of each matrix, or of each expert


class Statistics(NamedTuple):
    """What a cast does to a tensor."""

    amax: float
    underflow: float  # share of the numbers that become zero and were not
    overflow: float  # share of the numbers beyond the format


def power_of_two(amax: paddle.Tensor, *, kind: Kind = E4M3) -> paddle.Tensor:
    """The smallest power of two by which `amax` (fp32, finite) fits into the format; 1 for 0, never a subnormal."""
    bits = amax.contiguous().view("int32")
    exponent = bits // MANTISSA - BIAS - kind.top + (bits % MANTISSA > THREE_QUARTERS).astype("int32")
    scale = ((exponent.clip(min=1 - BIAS) + BIAS) * MANTISSA).view("float32")
    return paddle.where(bits == 0, paddle.ones_like(amax), scale)  # Paddle's == takes 1e-16 for 0


def _counts(shape: Sequence[int], counts: list[int] | None) -> list[int]:
    """Rows of every matrix, or expert."""
    if len(shape) == 3:
        assert counts is None, "a stack of matrices has no counts"
        return [shape[1]] * shape[0]
    assert len(shape) == 2, f"a matrix [R, C] or a stack [E, R, C] is quantised, not {list(shape)}"
    assert counts is None or sum(counts) == shape[0], f"{counts} are not the rows of {list(shape)}"
    return [shape[0]] if counts is None else counts


def _blocks_of(x_RC: paddle.Tensor, block: tuple[int, int]) -> paddle.Tensor:
    """A matrix as its blocks, filled up with zeros: [G, block rows, G, block columns]."""
    (rows, columns), (high, wide) = x_RC.shape, block
    padded = F.pad(x_RC, [0, -rows % high, 0, -columns % wide], pad_from_left_axis=True)
    return padded.reshape([-(-rows // high), high, -(-columns // wide), wide])


def _spread(scales_GG: paddle.Tensor, shape: Sequence[int], block: tuple[int, int]) -> paddle.Tensor:
    """The scale of every number of a matrix."""
    by_row = scales_GG.repeat_interleave(block[0], 0)[: shape[0]]
    return by_row.repeat_interleave(block[1], 1)[:, : shape[1]]


def _each(x: paddle.Tensor, counts: list[int]) -> list[paddle.Tensor]:
    """The matrices of a stack, or the rows of every expert that has any."""
    flat_RC, out, start = x.reshape([-1, x.shape[-1]]), [], 0
    for count in counts:
        if count:
            out.append(flat_RC[start : start + count])
        start += count
    return out


def _joined(parts: list[paddle.Tensor], like: Sequence[int], width: int, dtype: str) -> paddle.Tensor:
    """Matrices one below the other; a stack's as a stack."""
    if not parts:
        return paddle.zeros([*like[:-2], 0, width], dtype)
    joined = paddle.concat(parts)
    return joined.reshape([like[0], -1, width]) if len(like) == 3 else joined


def quantise_plain(
    x: paddle.Tensor, scheme: Scheme, *, kind: Kind, counts: list[int], scale: paddle.Tensor | None, name: str
) -> Float8:
    """The plain twin of `quantise`."""
    _require_finite(x, name=name, kind=kind)
    codes, scales, block = [], [], (1, 1)
    for index, part_RC in enumerate(_each(x, counts)):
        block = scheme.block(*part_RC.shape)
        blocks = _blocks_of(part_RC, block)
        own_GG = power_of_two(blocks.abs().amax([1, 3]), kind=kind) if scale is None else _given(scale, index)
        fitting = (part_RC / _spread(own_GG, part_RC.shape, block)).clip(-kind.largest, kind.largest)
        codes.append(fitting.astype(kind.name).view("uint8"))
        scales.append(own_GG)
    width = -(-x.shape[-1] // scheme.block(1, x.shape[-1])[1])
    return Float8(
        _joined(codes, x.shape, x.shape[-1], "uint8"), _joined(scales, x.shape, width, "float32"), scheme, kind, counts
    )  # fmt: skip


def _given(scale: paddle.Tensor, index: int) -> paddle.Tensor:
    flat = scale.astype("float32").reshape([-1])
    return flat[index if flat.shape[0] > 1 else 0].reshape([1, 1])


def _require_finite(x: paddle.Tensor, *, name: str, kind: Kind) -> None:
    if not bool(paddle.isfinite(x).all()):
        raise _not_finite(name, kind)


def _not_finite(name: str, kind: Kind) -> NotFinite:
    return NotFinite(f"{name} holds NaN or infinity, for which {kind.name} has no number")


def quantise(
    x: paddle.Tensor, scheme: Scheme, *, kind: Kind = E4M3, counts: list[int] | None = None,
    scale: paddle.Tensor | None = None, short: bool = False, name: str = "a tensor",
) -> Float8:  # fmt: skip
    """`x` in FP8. Under the scheme Tensor the caller may bring a `scale` (one, or one for each matrix), which need not
    be a power of two; what it does not cover is clamped. `short` lets rows and blocks of features end in a short
    block; tokens always may.

    Raises NotFinite with the `name` of x if it holds NaN or infinity.
    """
    assert scale is None or (isinstance(scheme, Tensor) and counts is None), "scales from outside are of whole matrices"
    counts = _counts(x.shape, counts)
    assert short or _fits(x.shape, scheme), f"{name}: {list(x.shape)} is no multiple of {scheme}"
    x, whole = x.astype("float32"), isinstance(scheme, Tensor)
    chosen = backend(x)
    if chosen == "gpu" and scale is None and float8_gpu.casts(scheme, kind, x.shape):
        _require_finite(x, name=name, kind=kind)
        return Float8(*float8_gpu.quantise(x, scheme), scheme, kind, counts)
    if chosen != "cpu":
        return quantise_plain(x, scheme, kind=kind, counts=counts, scale=scale, name=name)
    block = scheme.block(max(counts, default=0), x.shape[-1])
    made = cpu.quantise(x, block=block, kind=kind, counts=counts, whole=whole, given=scale)
    if made is None:
        raise _not_finite(name, kind)
    return Float8(*made, scheme, kind, counts)


def quantise_or_nan(x: paddle.Tensor, scheme: Scheme, *, tell: Callable[[str], None], **how: Any) -> Float8:
    """`quantise`, but what is not finite becomes NaN throughout, after `tell` was told so."""
    try:
        return quantise(x, scheme, **how)
    except NotFinite as error:
        tell(str(error))
    if how.get("scale") is not None:
        how["scale"] = paddle.ones_like(how["scale"])
    made = quantise(paddle.zeros_like(x), scheme, **how)
    return replace(made, codes=paddle.full_like(made.codes, _NAN))


def _fits(shape: Sequence[int], scheme: Scheme) -> bool:
    if isinstance(scheme, Rows):
        return shape[-1] % scheme.size == 0
    return not isinstance(scheme, Blocks) or not (shape[-2] % scheme.rows or shape[-1] % scheme.columns)


def dense_plain(x: Float8) -> paddle.Tensor:
    """The plain twin of `dense`."""
    numbers, scales = x.codes.view(x.kind.name).astype("float32"), x.scales.reshape([-1, x.scales.shape[-1]])
    parts, start = [], 0
    for part_RC in _each(numbers, x.counts):
        block = x.scheme.block(*part_RC.shape)
        stop = start - (-part_RC.shape[0] // block[0])
        parts.append(part_RC * _spread(scales[start:stop], part_RC.shape, block))
        start = stop
    return paddle.concat(parts).reshape(x.codes.shape) if parts else numbers


def dense(x: Float8) -> paddle.Tensor:
    """The fp32 numbers that codes and scales stand for."""
    if backend(x.scales) != "cpu":
        return dense_plain(x)
    block = x.scheme.block(max(x.counts, default=0), x.codes.shape[-1])
    return cpu.dense(x.codes, x.scales, block=block, kind=x.kind, counts=x.counts)


def rounded(
    x: paddle.Tensor, scheme: Scheme, *, kind: Kind = E4M3, counts: list[int] | None = None, short: bool = False,
    name: str = "a tensor",
) -> paddle.Tensor:  # fmt: skip
    """What is left of `x` after it was in FP8: dense(quantise(x)), in its own dtype."""
    return dense(quantise(x, scheme, kind=kind, counts=counts, short=short, name=name)).astype(x.dtype)


def bf16_numbers(x: paddle.Tensor) -> paddle.Tensor:
    """`x` in its own dtype, every number rounded to the nearest that bf16 has."""
    if backend(x) == "cpu":
        return cpu.bf16_numbers(x)
    return x.astype("bfloat16").astype(x.dtype)


def _by_gpu(left: Float8, right: Float8, num_in: int, num_out: int) -> bool:
    same = left.kind is right.kind is E4M3
    return same and backend(left.scales) == "gpu" and float8_gpu.multiplies(left.scheme, right.scheme, num_in, num_out)


def _operand(x: Float8) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Numbers that bf16 holds exactly, and what their product is still to be multiplied by, if anything: a scale, or
    one for each part."""
    if not isinstance(x.scheme, Tensor) or not x.codes.size:
        return dense(x), None
    flat = x.scales.reshape([-1])
    numbers = dense(replace(x, scales=paddle.ones_like(x.scales)))
    if flat.shape[0] in (1, len(x.counts)):
        return numbers, flat
    ordinals = itertools.accumulate(map(bool, x.counts))  # parts without rows have no scale; they get a neighbour's
    return numbers, flat[paddle.to_tensor([max(ordinal - 1, 0) for ordinal in ordinals])]


def _factors(*scales: paddle.Tensor | None, parts: int) -> paddle.Tensor | None:
    """What each part of a product is multiplied by."""
    found = [scale for scale in scales if scale is not None]
    if not found:
        return None
    return functools.reduce(paddle.multiply, found).expand([parts]).contiguous()


def product_plain(
    x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, *, counts: list[int], turned: bool
) -> paddle.Tensor:  # fmt: skip
    """Dense rows times their expert's dense weight: what the kernels do."""
    parts = [
        paddle.matmul(x_TD[rows], weight_EDF[expert], transpose_y=turned) for expert, rows in rows_of_experts(counts)
    ]
    return paddle.concat(parts) if parts else paddle.zeros([0, weight_EDF.shape[1 if turned else 2]])


def product(
    x: Float8, weight: Float8, *, turned: bool = False, counts: list[int] | None = None, out: Result = "bf16"
) -> paddle.Tensor:
    """x @ weight, or x @ weight^T if `turned`: [T, F], stored in fp32 (where a GPU's kernels round to bf16, in that).
    Of a stack of weights, expert e has the next counts[e] rows."""
    counts = [x.codes.shape[0]] if counts is None else counts
    if _by_gpu(x, weight, *weight.codes.shape[-2:]):
        stack = [held if weight.codes.ndim == 3 else held.unsqueeze(0) for held in (weight.codes, weight.scales)]
        dtype = "bfloat16" if out == "bf16" else "float32"
        held = (x.codes, x.scales), (stack[0], stack[1])
        return float8_gpu.product(*held, counts=counts, turned=turned, dtype=dtype)
    (x_TD, x_scale), (weight_EDF, weight_scales) = _operand(x), _operand(weight)
    weight_EDF = weight_EDF if weight_EDF.ndim == 3 else weight_EDF.unsqueeze(0)
    assert len(counts) == weight_EDF.shape[0], f"{len(counts)} counts for {weight_EDF.shape[0]} weights"
    factors = _factors(x_scale, weight_scales, parts=len(counts))
    if backend(x_TD, weight_EDF) == "cpu":
        y_TF = cpu.product(x_TD, weight_EDF, counts=counts, turned=turned)
        return cpu.finish_(y_TF, factors, counts=counts, bf16=out == "bf16")
    y_TF = product_plain(x_TD, weight_EDF, counts=counts, turned=turned)
    if factors is not None:
        y_TF = y_TF * factors.repeat_interleave(paddle.to_tensor(counts)).unsqueeze(-1)
    return bf16_numbers(y_TF) if out == "bf16" else y_TF


def weight_product_plain(x_TD: paddle.Tensor, grad_TF: paddle.Tensor, *, counts: list[int]) -> paddle.Tensor:
    """Each expert's dense rows, turned, times its gradients: what the kernels do."""
    grad_EDF = paddle.zeros([len(counts), x_TD.shape[1], grad_TF.shape[1]])
    for expert, rows in rows_of_experts(counts):
        grad_EDF[expert] = paddle.matmul(x_TD[rows], grad_TF[rows], transpose_x=True)
    return grad_EDF


def weight_product(x: Float8, grad: Float8, *, counts: list[int] | None = None) -> paddle.Tensor:
    """x^T @ grad, a weight's gradient in fp32: [D, F], or with counts [E, D, F], from each expert's rows."""
    of_rows = [x.codes.shape[0]] if counts is None else counts
    if _by_gpu(x, grad, x.codes.shape[-1], grad.codes.shape[-1]):
        made_EDF = float8_gpu.weight_product((x.codes, x.scales), (grad.codes, grad.scales), counts=of_rows)
        return made_EDF if counts is not None else made_EDF[0]
    (x_TD, x_scale), (grad_TF, grad_scale) = _operand(x), _operand(grad)
    chosen = cpu.weight_product if backend(x_TD, grad_TF) == "cpu" else weight_product_plain
    grad_EDF = chosen(x_TD, grad_TF, counts=of_rows)
    factors = _factors(x_scale, grad_scale, parts=len(of_rows))
    if factors is not None:
        grad_EDF = grad_EDF * factors.reshape([-1, 1, 1])
    return grad_EDF if counts is not None else grad_EDF[0]


def statistics(x: paddle.Tensor, cast: Float8) -> Statistics:
    """What the cast of `x` to `cast` did; worth its time at logging steps only."""
    x = x.astype("float32")
    if not x.size:
        return Statistics(0.0, 0.0, 0.0)
    limit = _scale_of_every_number(cast) * cast.kind.largest
    lost = ((x.abs() > 0) & ~(dense(cast).abs() > 0)).astype("float32").mean()  # == takes 1e-16 for 0
    return Statistics(float(x.abs().max()), float(lost), float((x.abs() > limit).astype("float32").mean()))


def _scale_of_every_number(x: Float8) -> paddle.Tensor:
    ones = paddle.full(x.codes.shape, 0x38 if x.kind is E4M3 else 0x3C, "uint8")  # the codes of 1
    return dense_plain(Float8(ones, x.scales, x.scheme, x.kind, x.counts))


def has_float8() -> bool:
    """Whether this build of Paddle and this device multiply FP8 (Hopper and later). Not run on a GPU."""
    if not (paddle.device.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")):
        return False
    return paddle.device.cuda.get_device_capability() >= (9, 0)
