"""The convolutional codes: a slow decoder written from their formulas, and what is said of their codewords."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import paddle
import pytest

from erniekit.ops.arrays.ccq import wint2_windows, wint25_windows
from erniekit.ops.arrays.packed import WINT2, WINT25
from erniekit.ops.cpu.library import call
from erniekit.ops.packed import packed_product, packed_product_plain, unpack, unpack_plain
from tests.unit.ops.twins import assert_close, assert_twins, drawn, outputs_and_gradients

KINDS = {"wint2": WINT2, "wint2.5": WINT25}


def slow_wint2(codes, local, code_scale, code_zp, super_scale):
    """Weight by weight; `codes` [D / 4, F], `local` [ceil(D / 128), F], the rest [F]."""
    weight = np.zeros([4 * len(codes), codes.shape[1]], np.float32)
    for row, column in np.ndindex(*weight.shape):
        scaled = np.float32(np.float32(codes[row // 4, column]) * code_scale[column])
        code = int(np.floor(np.float32(np.float32(scaled + code_zp[column]) + np.float32(0.5))))
        value = ((code >> (9, 6, 3, 0)[row % 4]) & 63) - 32
        local_scale = (int(local[row // 128, column]) >> (row // 64 + 1 & 1) * 4) & 15
        weight[row, column] = np.float32(value) * np.float32(np.float32(local_scale) * super_scale[column])
    return weight


def slow_wint25(words, super_scale):
    """Weight by weight; `words` [D / 64 * 10, F], `super_scale` [F]."""
    weight = np.zeros([len(words) // 10 * 64, words.shape[1]], np.float32)
    for row, column in np.ndindex(*weight.shape):
        group, place = divmod(row, 64)
        word, shift = (group * 10 + place // 7, (13, 11, 9, 6, 4, 2, 0)[place % 7])
        value = (int(words[word, column]) >> shift & 7) - 4
        local_scale = int(words[group * 10 + 9, column]) & 0x1FFF
        weight[row, column] = np.float32(value) * np.float32(np.float32(local_scale) * super_scale[column])
    return weight


def random_parts(kind, num_in, num_out, seed=0):
    """Random codes and scales, as packed weights lie, and the slow decoder's weight."""
    draw = np.random.default_rng([seed, num_in, num_out])
    super_scale = draw.uniform(-0.02, 0.02, num_out).astype(np.float32)
    if kind == "wint2.5":
        words = draw.integers(0, 1 << 16, [num_in // 64 * 10, num_out]).astype("<u2")
        return words.reshape(-1).view(np.uint8).reshape(-1, num_out), super_scale[None], slow_wint25(words, super_scale)
    codes = draw.integers(0, 256, [num_in // 4, num_out]).astype(np.uint8)
    local = draw.integers(0, 256, [-(-num_in // 128), num_out]).astype(np.uint8)
    code_scale = draw.uniform(-130, 130, num_out).astype(np.float32)
    code_zp = draw.uniform(-4000, 4000, num_out).astype(np.float32)
    weight = slow_wint2(codes, local, code_scale, code_zp, super_scale)
    return np.concatenate([codes, local]), np.stack([code_scale, code_zp, super_scale]), weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 1), (128, 5), (192, 37)], ids=str)
def test_all_decoders_give_the_slow_one_s_bits(kind, shape):
    codes, scales, weight = random_parts(kind, *shape)
    how = {"num_in": shape[0], "kind": KINDS[kind]}
    for way in (unpack, unpack_plain):
        found = way(paddle.to_tensor(codes), paddle.to_tensor(scales), **how)
        assert found.numpy().tobytes() == weight.tobytes()


def test_the_code_of_wint2_is_rounded_after_every_operation():
    """Sums close to a whole number, where a fused multiplication and addition finds another code than two steps."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 256, [16, 4000]).astype(np.uint8)
    code_scale = draw.uniform(100, 130, 4000).astype(np.float32)
    exact = codes[0] * code_scale.astype(np.float64)  # the first byte of each column falls a little short of a half
    code_zp = (np.round(exact) + 0.4995 - exact).astype(np.float32)
    fused = np.floor((exact + code_zp).astype(np.float32) + np.float32(0.5))
    stepwise = np.floor(codes[0] * code_scale + code_zp + np.float32(0.5))
    assert (fused != stepwise).sum() > 100
    local, super_scale = np.full([1, 4000], 255, np.uint8), np.ones(4000, np.float32)
    bytes_CF, scales_3F = np.concatenate([codes, local]), np.stack([code_scale, code_zp, super_scale])
    found = unpack(paddle.to_tensor(bytes_CF), paddle.to_tensor(scales_3F), num_in=64, kind=WINT2)
    columns = np.flatnonzero(fused != stepwise)[:50]
    part = [array[..., columns] for array in (codes, local, code_scale, code_zp, super_scale)]
    assert found.numpy()[:, columns].tobytes() == slow_wint2(*part).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 33], [0, 0]], ids=str)
def test_product(kind, counts):
    made = [random_parts(kind, 128, 12, seed) for seed in range(len(counts))]
    codes, scales, weights = (np.stack(arrays) for arrays in zip(*made, strict=True))
    how = {"codes_ECF": paddle.to_tensor(codes), "scales_EGF": paddle.to_tensor(scales), "kind": KINDS[kind]}
    arrays = {"x": drawn(sum(counts), 128)}
    fast, plain = (functools.partial(way, counts=counts, **how) for way in (packed_product, packed_product_plain))
    assert_twins(lambda x: fast(x), lambda x: plain(x), arrays)

    def through_dense(x):
        rows = x.split(counts) if sum(counts) else [x] * len(counts)
        return paddle.concat([part @ paddle.to_tensor(w) for part, w in zip(rows, weights, strict=True)])

    found = outputs_and_gradients(lambda x: fast(x), arrays)
    assert_close(found, outputs_and_gradients(through_dense, arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_made_in_several_blocks(kind):
    """2^18 numbers are dense at a time for few rows: 192 of these rows."""
    codes, scales, _ = random_parts(kind, 64, 1300)
    if kind == "wint2":
        codes = np.concatenate([np.tile(codes[:16], [7, 1]), np.tile(codes[16:], [4, 1])])
    else:
        codes = np.tile(codes, [7, 1])
    codes, scales, how = paddle.to_tensor(codes), paddle.to_tensor(scales), {"num_in": 448, "kind": KINDS[kind]}
    weight = unpack_plain(codes, scales, **how)
    arrays = {"x": drawn(3, 448)}
    found = outputs_and_gradients(
        lambda x: packed_product(x, codes[None], scales[None], counts=[3], kind=KINDS[kind]), arrays
    )
    assert_close(found, outputs_and_gradients(lambda x: x @ weight, arrays))


def test_neighbouring_windows_share_their_bits():
    bits = np.arange(1 << 16, dtype=np.uint16)
    v, _ = wint25_windows(np.tile(bits, [10, 1]))
    v = v[0] + 4
    for first in range(0, 63, 7):  # blocks of three and four
        for row in (first, first + 1, first + 3, first + 4, first + 5):
            assert ((v[row] & 1) == (v[row + 1] >> 2)).all()
    v = wint2_windows(np.float32(128.5), np.float32(-3), np.arange(256, dtype=np.uint8)[:, None])[..., 0] + 32
    assert ((v[:3] & 7) == (v[1:] >> 3)).all()


def least_errors_wint2(x, h, scales, code_scale, code_zp):
    """The error of the best codewords of each group, all 256 tried for four weights."""
    windows = wint2_windows(code_scale, code_zp, np.tile(np.arange(256)[:, None], [1, x.shape[1]]))
    words = windows.astype(np.float64).transpose(2, 1, 0)  # [F, 256, 4]
    parts = x.T.reshape(x.shape[1], -1, 1, 4) - np.repeat(scales.T, 16, 1)[:, :, None, None] * words[:, None]
    errors = (h.reshape(-1, 1, 4) * parts**2).sum(3).min(2)
    return errors.reshape(x.shape[1], -1, 16).sum(2).T


def least_errors_wint25(x, h, scales):
    """The same, all words of 7 and of 9 bits tried for three and four weights, and all eight numbers for the last."""
    three, four = np.arange(1 << 7), np.arange(1 << 9)
    three = np.stack([three >> shift & 7 for shift in (4, 2, 0)]) - 4
    four = np.stack([four >> shift & 7 for shift in (6, 4, 2, 0)]) - 4
    out, last = np.zeros(scales.shape), np.arange(-4, 4)[None]
    starts = [(i, three) for i in range(0, 63, 7)] + [(i + 3, four) for i in range(0, 63, 7)] + [(63, last)]
    for group, (start, words) in itertools.product(range(len(scales)), starts):
        rows = slice(group * 64 + start, group * 64 + start + len(words))
        off = x[rows, None] - scales[group] * words[:, :, None]
        out[group] += (h[rows, None, None] * off**2).sum(0).min(0)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_codewords_are_the_best_of_all(kind, weighted):
    num_in, num_out = 128, 19
    x, draw = drawn(num_in, num_out), np.random.default_rng(1)
    h = draw.gamma(0.5, size=num_in).astype(np.float32) if weighted else None
    scales = draw.uniform(0.04, 0.08, [2, num_out]).astype(np.float32) * (1 if kind == "wint2" else 8)
    xv, vv = np.empty([2, num_out]), np.empty([2, num_out])
    weights = np.ones(num_in) if h is None else h
    if kind == "wint2":
        code_scale = draw.uniform(100, 128, num_out).astype(np.float32)
        code_zp = draw.uniform(0, 700, num_out).astype(np.float32)
        codes = np.empty([num_in // 4, num_out], np.uint8)
        call("wint2_nearest", x.T.copy(), h, scales, code_scale, code_zp, codes, xv, vv, num_in, num_out)
        v = wint2_windows(code_scale, code_zp, codes).transpose(1, 0, 2)
        least = least_errors_wint2(x, weights, scales, code_scale, code_zp)
    else:
        words = np.empty([num_in // 64 * 10, num_out], np.uint16)
        call("wint25_nearest", x, h, scales, words, xv, vv, num_in, num_out)
        v, local = wint25_windows(words)
        assert not local.any()
        least = least_errors_wint25(x, weights, scales)
    v, groups, weights = v.reshape(2, 64, num_out), x.reshape(2, 64, num_out), weights.reshape(2, 64, 1)
    errors = (weights * (groups - scales[:, None] * v) ** 2).sum(1)
    np.testing.assert_allclose(errors, least, rtol=1e-6)
    np.testing.assert_allclose(xv, (weights * groups * v).sum(1), rtol=1e-6)
    np.testing.assert_allclose(vv, (weights * v * v).sum(1), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_codewords_of_decoded_weights_are_theirs(kind):
    num_in, num_out = 128, 9
    codes, scales, weight = random_parts(kind, num_in, num_out)
    sums = np.empty([2, num_out]), np.empty([2, num_out])
    h = np.random.default_rng(2).uniform(0.1, 1, num_in).astype(np.float32)
    if kind == "wint2":
        scales[:2] = np.array([[120.953125], [611]])  # 256 different codewords
        codes[32] = np.maximum(codes[32] & 15, 1) | np.maximum(codes[32] >> 4, 1) << 4  # no group of zeros
        weight = slow_wint2(codes[:32], codes[32:], *scales)
        group_scales = np.stack([codes[32] >> 4, codes[32] & 15]) * scales[2]
        found = np.empty_like(codes[:32])
        call("wint2_nearest", weight.T.copy(), h, group_scales, *scales[:2], found, *sums, num_in, num_out)
        assert (found == codes[:32]).all()
    else:
        words = codes.reshape(-1).view(np.uint16).reshape(-1, num_out)
        local = words[9::10] & 0x1FFF
        found = np.empty_like(words)
        call("wint25_nearest", weight, h, local * scales[0], found, *sums, num_in, num_out)
        found[9::10] |= local
        assert (found == words).all()
