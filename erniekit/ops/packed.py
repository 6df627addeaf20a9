"""Products with frozen weights that are kept in few bits: x @ (level(code) * scale), for stacked experts too.

Forward and backward both make the dense weight, a block or an expert at a time, and drop it; nothing but the incoming
gradient is needed backward, and the weight has no gradient. How codes lie: ops/arrays/packed.py.
Shapes: T rows sorted by expert, E experts, D inputs, F outputs, C rows of codes, G groups.
"""

from __future__ import annotations

import paddle

from erniekit.ops.arrays.ccq import GROUP, WINT2_SHIFTS, WINT25_SHIFTS, WORDS
from erniekit.ops.arrays.packed import E4M3, INT8, LEVELS, WINT2, WINT25
from erniekit.ops.cpu import packed as cpu
from erniekit.ops.dispatch import backend


def unpack_plain(codes_CF: paddle.Tensor, scales_GF: paddle.Tensor, *, num_in: int, kind: int) -> paddle.Tensor:
    """The plain twin of `unpack`."""
    groups, num_out = scales_GF.shape
    if kind in (WINT2, WINT25):
        windows, local_GF = (_wint2 if kind == WINT2 else _wint25)(codes_CF, scales_GF, num_in)
        scales_G1F = (local_GF.astype("float32") * scales_GF[-1]).unsqueeze(1)
        return (windows.astype("float32") * scales_G1F).reshape([num_in, num_out])
    if kind == INT8:
        levels_DF = codes_CF.astype("float32")
    elif kind == E4M3:
        levels_DF = paddle.to_tensor(LEVELS[kind])[codes_CF.astype("int32")]
    else:
        pairs_CF = codes_CF.astype("int32")
        places_DF = paddle.stack([pairs_CF % 16, pairs_CF // 16], 1).reshape([-1, num_out])[:num_in]
        levels_DF = paddle.to_tensor(LEVELS[kind])[places_DF]
    return (levels_DF.reshape([groups, -1, num_out]) * scales_GF.unsqueeze(1)).reshape([num_in, num_out])


def _wint2(codes_CF: paddle.Tensor, scales_3F: paddle.Tensor, num_in: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Weights as whole numbers [groups, 64, F], and local scales [groups, F]."""
    bytes_CF = codes_CF.astype("float32")[: num_in // 4]
    places_CF = (bytes_CF * scales_3F[0] + scales_3F[1] + 0.5).floor().astype("int32")
    windows = paddle.stack([places_CF // 2**shift % 64 - 32 for shift in WINT2_SHIFTS.tolist()], 1)
    pairs_CF = codes_CF.astype("int32")[num_in // 4 :]
    local_GF = paddle.stack([pairs_CF // 16, pairs_CF % 16], 1).reshape([-1, codes_CF.shape[1]])
    return windows.reshape([-1, GROUP, codes_CF.shape[1]]), local_GF[: num_in // GROUP]


def _wint25(codes_CF: paddle.Tensor, scales_1F: paddle.Tensor, num_in: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """As `_wint2`."""
    pairs = codes_CF.reshape([num_in // GROUP, WORDS, scales_1F.shape[1], 2]).astype("int32")
    words = pairs[..., 0] + pairs[..., 1] * 256
    windows = paddle.stack([words[:, :9] // 2**shift % 8 for shift in WINT25_SHIFTS.tolist()], 2)
    last = words[:, 9:] // 2**13
    return paddle.concat([windows.reshape([len(words), 63, -1]), last], 1) - 4, words[:, 9] % 2**13


def unpack(codes_CF: paddle.Tensor, scales_GF: paddle.Tensor, *, num_in: int, kind: int) -> paddle.Tensor:
    """The dense weight [D, F] of one expert or linear layer, in fp32."""
    chosen = cpu.unpack if backend(scales_GF) == "cpu" else unpack_plain
    return chosen(codes_CF, scales_GF, num_in=num_in, kind=kind)


class _Product(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x_TD, codes_ECF, scales_EGF, counts: list[int], kind: int):
        ctx.weight = codes_ECF, scales_EGF, counts, {"num_in": x_TD.shape[1], "kind": kind}
        return _multiplied(x_TD, *ctx.weight, turned=False)

    @staticmethod
    def backward(ctx, grad_TF):
        return _multiplied(grad_TF, *ctx.weight, turned=True), None, None


def _multiplied(x, codes_ECF, scales_EGF, counts: list[int], how: dict[str, int], *, turned: bool) -> paddle.Tensor:
    """Each expert's rows times its weight, or its transpose."""
    out, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            weight_DF = unpack_plain(codes_ECF[expert], scales_EGF[expert], **how).astype(x.dtype)
            out.append(paddle.matmul(x[start : start + count], weight_DF, transpose_y=turned))
        start += count
    width = how["num_in"] if turned else scales_EGF.shape[2]
    return paddle.concat(out) if out else paddle.zeros([0, width], x.dtype)


def packed_product_plain(
    x_TD: paddle.Tensor, codes_ECF: paddle.Tensor, scales_EGF: paddle.Tensor, *, counts: list[int], kind: int
) -> paddle.Tensor:
    """The plain twin of `packed_product`."""
    return _Product.apply(x_TD, codes_ECF, scales_EGF, counts, kind)


def packed_product(
    x_TD: paddle.Tensor, codes_ECF: paddle.Tensor, scales_EGF: paddle.Tensor, *, counts: list[int], kind: int,
    bf16: bool = False,
) -> paddle.Tensor:  # fmt: skip
    """x @ weight_e, [T, F], for rows sorted by expert; `counts[e]` rows belong to expert e."""
    if backend(x_TD, scales_EGF) == "cpu":
        return cpu.product(x_TD, codes_ECF, scales_EGF, counts=counts, kind=kind, bf16=bf16)
    return packed_product_plain(x_TD, codes_ECF, scales_EGF, counts=counts, kind=kind)
