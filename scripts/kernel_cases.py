"""What bench_kernels.py runs: each kernel of erniekit/ops/triton at the sizes of ERNIE 4.5's experts, a check of it in
torch, and what it is compared with. The checks share no code with the kernels.

Shapes: M tokens, C choices, T = M*C routed rows, D hidden size, I width of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from erniekit.ops.triton import grouped, moves, quantise, swiglu

BLOCK, LARGEST = 128, 448.0
FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


class Shape(NamedTuple):
    """Routed experts as one GPU holds them."""

    name: str
    tokens: int
    choices: int
    hidden: int
    width: int
    experts: int


# 21B-A3B with all 64 experts; of 300B-A47B an eighth, as 8 expert-parallel ranks have them, with 4,096 tokens each.
SHAPES = {
    "21B-A3B": Shape("21B-A3B", 8192, 6, 2560, 1536, 64),
    "300B-A47B": Shape("300B-A47B", 4096, 8, 8192, 3584, 8),
}
TINY = Shape("tiny", 40, 2, 256, 128, 3)


class Case(NamedTuple):
    """One kernel at one shape."""

    name: str
    run: Callable[[Any], None]  # with one of the settings
    error: Callable[[], float]  # of what the last run left
    limit: float  # that error may be this large
    bytes: int
    flops: int = 0
    numbers: str = "fp8"  # of its products
    settings: tuple[Any, ...] = (None,)
    peers: dict[str, Callable[[], Any]] = {}  # noqa: RUF012 - never written to
    results: tuple[torch.Tensor, ...] = ()  # written by the run


def blocks_of(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A matrix as [G, block rows, G, block columns]."""
    (rows, columns), (high, wide) = x.shape, block
    padded = torch.nn.functional.pad(x, [0, -columns % wide, 0, -rows % high])
    return padded.reshape(-(-rows // high), high, -(-columns // wide), wide)


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """The scale of every number."""
    by_row = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return by_row.repeat_interleave(block[1], 1)[:, : shape[1]]


def quantised(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(E4M3 numbers, scales) of a matrix: powers of two, found by division of numbers and not by their bits."""
    x = x.float()
    amax = blocks_of(x, block).abs().amax((1, 3))
    half, _ = torch.frexp(amax)  # 0.5 <= half < 1, and amax / half is a power of two
    scales = amax / half * torch.where(half > 0.875, 2 / 512, 1 / 512)  # 448 is 0.875 * 512
    scales = torch.where(amax == 0, torch.ones_like(amax), scales)
    return (x / spread(scales, x.shape, block)).clamp(-LARGEST, LARGEST).to(FP8), scales


def differing(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of codes that differ."""
    return (found.view(torch.uint8) != expected.view(torch.uint8)).float().mean().item()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the error over that of what is expected; NaN never passes as small."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return float("inf") if error.isnan() else error.item()


class Routed:
    """Operands of one shape: rows routed at random, some experts with more of them than others, sorted by expert."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        torch.manual_seed(0)
        drawn = torch.randn(shape.tokens, shape.experts) + torch.randn(shape.experts) * 0.5
        ids = drawn.topk(shape.choices, 1).indices.reshape(-1)
        order = torch.argsort(ids, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        self.rows, self.ends_list = len(order), torch.bincount(ids, minlength=shape.experts).cumsum(0).tolist()
        self.places = places.reshape(shape.tokens, shape.choices).to(device)
        self.ends = torch.tensor(self.ends_list, dtype=torch.int32).to(device)

    def drawn(self, *size: int) -> torch.Tensor:
        """bf16 numbers with outliers."""
        x = torch.randn(size, device=self.device)
        return (x * torch.where(torch.rand_like(x) < 1e-3, 50.0, 1.0)).to(BF16)

    def empty(self, *size: int, dtype: torch.dtype = FP8) -> torch.Tensor:
        """What is not written shows."""
        out = torch.empty(size, device=self.device, dtype=dtype)
        return out.view(torch.uint8).fill_(0x7F).view(dtype) if dtype == FP8 else out.fill_(float("nan"))

    def scales(self, rows: int, columns: int) -> torch.Tensor:
        """Room for scales of rows: neighbours in memory belong to neighbouring rows."""
        return self.empty(-(-columns // BLOCK), rows, dtype=FP32).T

    def experts(self) -> Iterator[tuple[int, slice]]:
        """Of the experts with rows, the first and the last: what is checked."""
        bounds = list(zip([0, *self.ends_list], self.ends_list, strict=False))
        held = [expert for expert, (start, end) in enumerate(bounds) if end > start]
        yield from ((expert, slice(*bounds[expert])) for expert in {held[0], held[-1]})


def copying(size: int, device: str) -> dict[str, Callable[[], Any]]:
    """A copy that reads and writes `size` bytes together."""
    if device != "cuda":
        return {}
    source = torch.randint(0, 255, [size // 2], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"torch copy": lambda: target.copy_(source)}


def quantising(routed: Routed) -> Iterator[Case]:
    """Rows, rows sent to their experts, weights, and rows along the tokens."""
    m, c, d, i, e = routed.shape[1:]
    x, codes, scales = routed.drawn(m, d), routed.empty(m, d), routed.scales(m, d)

    def rows_error() -> float:
        expected, powers = quantised(x, (1, BLOCK))
        return differing(codes, expected) + (scales != powers).float().mean().item()

    size = m * d * 3 + m * d // 32
    yield Case(
        "quantise rows", lambda _: quantise.quantise_rows(x, codes, scales), rows_error, 0, size,
        peers=copying(size, routed.device),
    )  # fmt: skip

    sent, sent_scales = routed.empty(m * c, d), routed.scales(m * c, d)

    def sent_error() -> float:
        expected, powers = quantised(x, (1, BLOCK))
        places = routed.places.reshape(-1)
        expected, powers = (t.repeat_interleave(c, 0) for t in (expected.view(torch.uint8), powers))
        found, found_scales = sent.view(torch.uint8)[places], sent_scales[places]
        return differing(found, expected) + (found_scales != powers).float().mean().item()

    size = m * d * (2 + c) + m * c * d // 32
    yield Case(
        "permute + quantise", lambda _: quantise.quantise_rows(x, sent, sent_scales, places=routed.places), sent_error,
        0, size, peers=copying(size, routed.device),
    )  # fmt: skip

    w = routed.drawn(e, d, 2 * i)
    w_codes, turned = routed.empty(e, d, 2 * i), routed.empty(e, 2 * i, d)
    w_scales = routed.empty(e, -(-d // BLOCK), -(-2 * i // BLOCK), dtype=FP32)

    def weight_error() -> float:
        error = 0.0
        for expert in {0, e - 1}:
            expected, powers = quantised(w[expert], (BLOCK, BLOCK))
            error += differing(w_codes[expert], expected) + differing(turned[expert].T.contiguous(), expected)
            error += (w_scales[expert] != powers).float().mean().item()
        return error

    size = e * d * 2 * i * 4
    yield Case(
        "quantise weights, both ways round", lambda _: quantise.quantise_blocks(w, w_codes, w_scales, turned=turned),
        weight_error, 0, size, peers=copying(size, routed.device),
    )  # fmt: skip

    t = routed.rows
    x_T, padded = routed.drawn(t, d), quantise.padded_rows(t, e)
    along, along_scales = routed.empty(d, padded), routed.empty(padded // BLOCK, d, dtype=FP32)

    def along_error() -> float:
        error, at = 0.0, 0
        bounds = list(zip([0, *routed.ends_list], routed.ends_list, strict=False))
        for start, end in bounds:
            if start < end:
                expected, powers = quantised(x_T[start:end], (BLOCK, 1))
                error += differing(along[:, at : at + end - start].T.contiguous(), expected)
                error += (along_scales[at // BLOCK :][: len(powers)] != powers).float().mean().item()
            at += -(-(end - start) // BLOCK) * BLOCK
        return error

    size = t * d * 3 + t * d // 32
    yield Case(
        "quantise along tokens", lambda _: quantise.quantise_columns(x_T, along, along_scales, ends=routed.ends),
        along_error, 0, size, peers=copying(size, routed.device),
    )  # fmt: skip


def activating(routed: Routed) -> Iterator[Case]:
    """The Hadamard rotation and the weighted activation."""
    m, _, d, i, _ = routed.shape[1:]
    x, codes = routed.drawn(m, d), routed.empty(m, d)
    scale, amax = torch.full([1], 0.37, device=routed.device), torch.zeros(1, dtype=torch.int32, device=routed.device)

    def rotated() -> torch.Tensor:
        h = torch.ones(1, 1, dtype=torch.float64, device=routed.device)
        while len(h) < 32:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return (x.double().reshape(-1, 32) @ h).reshape(x.shape)

    def rotation_error() -> float:
        return differing(codes, (rotated().float() / scale).clamp(-LARGEST, LARGEST).to(FP8))

    size = m * d * 3
    yield Case(
        "Hadamard + quantise", lambda _: quantise.rotate_quantise(x, codes, scale=scale), rotation_error, 1e-3, size,
        peers=copying(size, routed.device),
    )  # fmt: skip
    yield Case(
        "Hadamard, largest number", lambda _: quantise.rotated_amax(x, amax),
        lambda: abs(amax.view(FP32).item() / rotated().abs().max().item() - 1), 1e-5, m * d * 2,
    )  # fmt: skip

    t = routed.rows
    hidden, grad, weights = routed.drawn(t, 2 * i), routed.drawn(t, i), torch.rand(t, device=routed.device)
    inner, inner_scales = routed.empty(t, i), routed.scales(t, i)

    def formula() -> list[torch.Tensor]:
        """The activation and its gradients, by torch's autograd in fp64."""
        h, w = (leaf.double().requires_grad_() for leaf in (hidden, weights))
        gate, up = h.chunk(2, -1)
        activated = torch.nn.functional.silu(gate) * up * w[:, None]
        return [activated.detach(), *torch.autograd.grad(activated, (h, w), grad.double())]

    size = t * i * 5 + t * i // 32
    yield Case(
        "weighted SwiGLU + quantise", lambda _: swiglu.weighted_swiglu(hidden, weights, inner, inner_scales),
        lambda: differing(inner, quantised(formula()[0], (1, BLOCK))[0]), 2e-3, size,
        peers=copying(size, routed.device),
    )  # fmt: skip

    out = {
        "grad_hidden": routed.empty(t, 2 * i, dtype=BF16), "grad_weights": routed.empty(t, dtype=FP32),
        "activated": routed.empty(t, i, dtype=BF16), "codes": routed.empty(t, 2 * i), "scales": routed.scales(t, 2 * i),
    }  # fmt: skip

    def backward_error() -> float:
        names = ("activated", "grad_hidden", "grad_weights")
        error = max(off(out[name], expected) for name, expected in zip(names, formula(), strict=True))
        return error + differing(out["codes"], quantised(out["grad_hidden"], (1, BLOCK))[0])

    size = t * i * (6 + 4 + 2 + 2) + t * i // 16
    yield Case(
        "weighted SwiGLU backward + quantise", lambda _: swiglu.weighted_swiglu_backward(hidden, weights, grad, **out),
        backward_error, 4e-3, size, peers=copying(size, routed.device),
    )  # fmt: skip


def moving(routed: Routed) -> Iterator[Case]:
    """bf16 rows to their experts and back."""
    m, c, d = routed.shape[1:4]
    x, sent, back = routed.drawn(m, d), routed.empty(m * c, d, dtype=BF16), routed.empty(m, d, dtype=BF16)
    weights, places = torch.rand(m, c, device=routed.device), routed.places
    rows, of_weights = routed.drawn(m * c, d), routed.empty(m, c, dtype=BF16)
    size = m * d * 2 * (1 + c)
    yield Case(
        "permute", lambda _: moves.spread(x, sent, places=places),
        lambda: off(sent[places], x[:, None].expand(-1, c, -1)), 0, size, peers=copying(size, routed.device),
    )  # fmt: skip
    yield Case(
        "weighted sum of rows", lambda _: moves.gather(rows, back, places=places, weights=weights),
        lambda: off(back, (rows[places].double() * weights[..., None]).sum(1)), 4e-3, size,
        peers=copying(size, routed.device),
    )  # fmt: skip
    yield Case(
        "gradient of the sum's weights", lambda _: moves.dots(rows, x, of_weights, places=places),
        lambda: off(of_weights, (rows[places].double() @ x.double()[..., None])[..., 0]), 4e-3, size,
        peers=copying(size, routed.device),
    )  # fmt: skip


def products(routed: Routed, name: str, k: int, n: int) -> Iterator[Case]:
    """Forward, gradient of rows and gradient of weights of one stack of weights [E, K, N], in FP8 and in bf16."""
    t, e, ends = routed.rows, routed.shape.experts, routed.ends
    x, w, g = routed.drawn(t, k), routed.drawn(e, k, n), routed.drawn(t, n)
    y, grad_x = routed.empty(t, n, dtype=BF16), routed.empty(t, k, dtype=BF16)
    grad_w = routed.empty(e, k, n, dtype=FP32)
    flops, is_timed = 2 * t * k * n, routed.device == "cuda"
    bounds = list(zip([0, *routed.ends_list], routed.ends_list, strict=False))

    def peers(product: Callable[[int, slice], Any], whole: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        def each() -> None:
            for expert, (start, end) in enumerate(bounds):
                product(expert, slice(start, end))

        return {"torch bf16, an expert at a time": each, "torch bf16, one product": whole} if is_timed else {}

    forward = peers(lambda expert, rows: x[rows] @ w[expert], lambda: x @ w[0])
    backward = peers(lambda expert, rows: g[rows] @ w[expert].T, lambda: g @ w[0].T)
    of_weight = peers(lambda _, rows: x[rows].T @ g[rows], lambda: x.T @ g)

    def error(found: Callable[[int, slice], torch.Tensor], product: Callable[[int, slice], torch.Tensor]) -> float:
        return max(off(found(expert, rows), product(expert, rows)) for expert, rows in routed.experts())

    yield Case(
        f"bf16 {name} forward", lambda s: grouped.product16(x, w, y, ends=ends, setting=s),
        lambda: error(lambda _, rows: y[rows], lambda expert, rows: x[rows].double() @ w[expert].double()), 4e-3,
        2 * (t * k + e * k * n + t * n), flops, "bf16", grouped.BF16, forward, (y,),
    )  # fmt: skip
    yield Case(
        f"bf16 {name} gradient of rows", lambda s: grouped.product16(g, w, grad_x, ends=ends, turned=True, setting=s),
        lambda: error(lambda _, rows: grad_x[rows], lambda expert, rows: g[rows].double() @ w[expert].double().T), 4e-3,
        2 * (t * k + e * k * n + t * n), flops, "bf16", grouped.BF16, backward, (grad_x,),
    )  # fmt: skip
    yield Case(
        f"bf16 {name} gradient of weights", lambda s: grouped.weight_product16(x, g, grad_w, ends=ends, setting=s),
        lambda: error(lambda expert, _: grad_w[expert], lambda _, rows: x[rows].double().T @ g[rows].double()), 1e-4,
        2 * t * (k + n) + 4 * e * k * n, flops, "bf16", grouped.BF16, of_weight, (grad_w,),
    )  # fmt: skip

    x8, g8 = (routed.empty(t, k), routed.scales(t, k)), (routed.empty(t, n), routed.scales(t, n))
    w8, turned = routed.empty(e, k, n), routed.empty(e, n, k)
    w_scales = routed.empty(e, -(-k // BLOCK), -(-n // BLOCK), dtype=FP32)
    padded = quantise.padded_rows(t, e)
    along = [(routed.empty(size, padded), routed.empty(padded // BLOCK, size, dtype=FP32)) for size in (k, n)]
    quantise.quantise_rows(x, *x8)
    quantise.quantise_rows(g, *g8)
    quantise.quantise_blocks(w, w8, w_scales, turned=turned)
    for rows, (codes, scales) in zip((x, g), along, strict=True):
        quantise.quantise_columns(rows, codes, scales, ends=ends)

    def dense(operand: tuple[torch.Tensor, torch.Tensor], rows: slice) -> torch.Tensor:
        codes = operand[0][rows]
        return (codes.float() * spread(operand[1][rows], codes.shape, (1, BLOCK))).double()

    def dense_weight(expert: int) -> torch.Tensor:
        return (w8[expert].float() * spread(w_scales[expert], w8[expert].shape, (BLOCK, BLOCK))).double()

    def dense_along(rows: slice, operand: torch.Tensor) -> torch.Tensor:
        codes, scales = quantised(operand[rows], (BLOCK, 1))
        return (codes.float() * spread(scales, codes.shape, (BLOCK, 1))).double()

    yield Case(
        f"FP8 {name} forward",
        lambda s: grouped.product8(x8, (turned, w_scales.transpose(1, 2)), y, ends=ends, setting=s),
        lambda: error(lambda _, rows: y[rows], lambda expert, rows: dense(x8, rows) @ dense_weight(expert)), 4e-3,
        t * k + e * k * n + 2 * t * n, flops, "fp8", grouped.FLOAT8, forward, (y,),
    )  # fmt: skip
    yield Case(
        f"FP8 {name} gradient of rows", lambda s: grouped.product8(g8, (w8, w_scales), grad_x, ends=ends, setting=s),
        lambda: error(lambda _, rows: grad_x[rows], lambda expert, rows: dense(g8, rows) @ dense_weight(expert).T),
        4e-3, t * n + e * k * n + 2 * t * k, flops, "fp8", grouped.FLOAT8, backward, (grad_x,),
    )  # fmt: skip
    yield Case(
        f"FP8 {name} gradient of weights",
        lambda s: grouped.weight_product8(along[0], along[1], grad_w, ends=ends, add=False, setting=s),
        lambda: error(lambda expert, _: grad_w[expert], lambda _, rows: dense_along(rows, x).T @ dense_along(rows, g)),
        1e-3, t * (k + n) + 4 * e * k * n, flops, "fp8", grouped.FLOAT8, of_weight, (grad_w,),
    )  # fmt: skip


def cases(shape: Shape, device: str) -> Iterator[Case]:
    """Every kernel at this shape, one after the other: the operands of one are gone when the next begins."""
    routed = Routed(shape, device)
    yield from quantising(routed)
    yield from activating(routed)
    yield from moving(routed)
    yield from products(routed, "gate and up", shape.hidden, 2 * shape.width)
    yield from products(routed, "down", shape.width, shape.hidden)
