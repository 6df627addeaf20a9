"""Encoders of the convolutional codes wint2 and wint2.5 (arXiv 2507.07145; how they lie: ops/arrays/ccq.py).

Only the decoder is published; this search is our own. Each column (an output) is searched by itself for the least sum
of h (weight - decoded)^2, h the mean square of each input (or one). For given scales the nearest codewords are exact:
all 256 of wint2's four weights, all paths through wint2.5's blocks. What they leave open are the scales:

* wint2. A column's codewords are floor(k * code_scale + code_zp + 0.5), one line folded into four dimensions, and
  how well it covers them jumps with both numbers: 128 is degenerate, 120.95 with zero points about 600 covers normal
  weights best of all that fit 15 bits. So: (1) of `books` near that best, the one that suits the column, with a scale
  of its own for each 64 rows; (2) the super scale for which those, as whole numbers to 15, cost least; (3) rounds of
  nearest codewords, neighbouring local scales and least squares; (4) `polish` small moves of both numbers of the code.
  These lie on a grid on which the decoder's arithmetic is exact, so that a fused product and sum decodes the same.
* wint2.5. (1) For each 64 rows the best of a grid of scales, for either sign of the column's super scale (windows
  reach from -4 to 3); (2) least squares for those codewords and nearest codewords again; (3) 13 bits of local scale.

A step that does not lower a column's error is not taken. Columns are scaled by powers of two first, and super scales
are bf16 as FastDeploy keeps them. Knows arrays, no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from erniekit.base.errors import CheckpointError
from erniekit.ops.arrays.ccq import GROUP, WORDS, wint2_dense, wint25_dense
from erniekit.ops.arrays.threads import spread
from erniekit.precision.encoders import SCALE, WEIGHT, Field
from erniekit.precision.quantize import require_finite

SUPER, CODE_SCALE, CODE_ZP = "super_scales", "code_scale", "code_zp"
BF16 = np.dtype(ml_dtypes.bfloat16)
Search = Literal["fast", "full"]

_BEST_BOOK = (120.953125, 611.0)  # code_scale, code_zp
_GRID = np.array([1 / 256, 1])  # of both: the decoder's sums are exact
_SPREAD, _NEAR = np.array([28, 140]), 17  # steps of the grid: where codes are good, where they are polished
_STEP = 0.0628  # of wint2: a window's unit / root mean square
_STEPS = tuple(np.linspace(0.3, 0.75, 10).tolist())  # of wint2.5
_DAMPING = 0.01  # of the mean of h, so that inputs that calibration never saw keep their weights
_COLUMNS = 512  # that are searched together


@dataclass(frozen=True)
class Effort:
    """How many codes of wint2 are tried for a column: near the best in general, and near the column's own."""

    books: int
    polish: int
    rounds: int


EFFORTS: dict[Search, Effort] = {"fast": Effort(4, 0, 1), "full": Effort(24, 16, 2)}


class Wint2:
    """2.0625 bits: see Encoder. FastDeploy's loader wants inputs in multiples of 128."""

    multiple = GROUP

    def __init__(self, search: Search = "full") -> None:
        self.effort = EFFORTS[search]

    def fields(self, num_in: int, num_out: int) -> dict[str, Field]:
        """See Encoder."""
        byte, fp32 = np.dtype(np.uint8), np.dtype(np.float32)
        return {
            WEIGHT: Field(byte, (num_in // 4, num_out)),
            SCALE: Field(byte, (-(-num_in // (2 * GROUP)), num_out)),
            SUPER: Field(BF16, (num_out,)),
            CODE_SCALE: Field(fp32, (num_out,)),
            CODE_ZP: Field(fp32, (num_out,)),
        }

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """See Encoder."""
        h_D = _checked(weight_DF, hessian_diag, name=name)
        made = {field: np.zeros(shape, dtype) for field, (dtype, shape) in self.fields(*weight_DF.shape).items()}
        for first in range(0, weight_DF.shape[1], _COLUMNS):
            part = slice(first, first + _COLUMNS)
            for field, array in _wint2_columns(weight_DF[:, part], h_D, self.effort).items():
                made[field][..., part] = array
        return made

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        codes_BF, scales_3F = self.packed(arrays)
        out_DF = np.empty([num_in, codes_BF.shape[1]], np.float32)
        rows = _rows(num_in)
        spread(len(rows), lambda i: wint2_dense(codes_BF, scales_3F, out_DF[rows[i]], num_in, rows[i].start))
        return out_DF

    def packed(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales as ops/packed.py takes them."""
        scales = [arrays[field].astype(np.float32) for field in (CODE_SCALE, CODE_ZP, SUPER)]
        return np.concatenate([arrays[WEIGHT], arrays[SCALE]]), np.stack(scales)


class Wint25:
    """2.5 bits: see Encoder. Words are kept as int16, as FastDeploy's operator takes them."""

    multiple = GROUP

    def fields(self, num_in: int, num_out: int) -> dict[str, Field]:
        """See Encoder."""
        words = Field(np.dtype(np.int16), (num_in // GROUP * WORDS, num_out))
        return {WEIGHT: words, SUPER: Field(BF16, (num_out,))}

    def encode(
        self, weight_DF: np.ndarray, *, name: str, hessian_diag: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """See Encoder."""
        h_D = _checked(weight_DF, hessian_diag, name=name)
        made = {field: np.zeros(shape, dtype) for field, (dtype, shape) in self.fields(*weight_DF.shape).items()}
        for first in range(0, weight_DF.shape[1], _COLUMNS):
            part = slice(first, first + _COLUMNS)
            for field, array in _wint25_columns(weight_DF[:, part], h_D).items():
                made[field][..., part] = array
        return made

    def decode(self, arrays: Mapping[str, np.ndarray], *, num_in: int) -> np.ndarray:
        """See Encoder."""
        codes_BF, scales_1F = self.packed(arrays)
        out_DF = np.empty([num_in, codes_BF.shape[1]], np.float32)
        rows = _rows(num_in)
        spread(len(rows), lambda i: wint25_dense(codes_BF, scales_1F, out_DF[rows[i]], rows[i].start))
        return out_DF

    def packed(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales as ops/packed.py takes them."""
        words, super_1F = np.ascontiguousarray(arrays[WEIGHT]), arrays[SUPER].astype(np.float32)[None]
        return words.reshape(-1).view(np.uint8).reshape(-1, words.shape[1]), super_1F


def _rows(num_in: int) -> list[slice]:
    return [slice(first, first + GROUP) for first in range(0, num_in, GROUP)]


def _checked(weight_DF: np.ndarray, hessian_diag: np.ndarray | None, *, name: str) -> np.ndarray | None:
    """h, damped and of mean about one; None: all one. Raises CheckpointError for what has no code."""
    require_finite(weight_DF, name=name)
    if len(weight_DF) % GROUP:
        raise CheckpointError(
            f"{name} has {len(weight_DF)} inputs. A convolutional code scales {GROUP} at a time and is not padded: "
            f"keep this weight in wint4 or wint8, which fit all."
        )
    if hessian_diag is None:
        return None
    require_finite(hessian_diag, name=f"the calibration of {name}")
    mean = float(hessian_diag.mean(dtype=np.float64))
    assert hessian_diag.shape == (len(weight_DF),) and hessian_diag.min() >= 0
    return (hessian_diag / mean + _DAMPING).astype(np.float32) if mean > 0 else None


class _Columns:
    """Some columns of a weight, scaled by powers of two to numbers below one, and what errors are counted from."""

    def __init__(self, weight_DF: np.ndarray, h_D: np.ndarray | None) -> None:
        self.exponent_F = np.frexp(np.abs(weight_DF).max(0))[1]
        self.x_DF, self.h_D = np.ldexp(weight_DF, -self.exponent_F).astype(np.float32), h_D
        self.num_in, self.num_out = weight_DF.shape
        groups = self.x_DF.astype(np.float64).reshape(-1, GROUP, self.num_out)
        h = np.ones([len(groups), GROUP]) if h_D is None else h_D.astype(np.float64).reshape(-1, GROUP)
        self.xx_GF = np.einsum("gi,gif,gif->gf", h, groups, groups)
        self.rms_GF = np.sqrt(self.xx_GF / h.sum(1)[:, None])

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Places for xv and vv."""
        return np.empty(self.xx_GF.shape), np.empty(self.xx_GF.shape)

    def errors(self, scale_GF: np.ndarray, xv_GF: np.ndarray, vv_GF: np.ndarray) -> np.ndarray:
        """Of each group, if it has these scales."""
        return self.xx_GF - 2 * scale_GF * xv_GF + scale_GF**2 * vv_GF

    def super_scales(self, scale_F: np.ndarray) -> np.ndarray:
        """As they are stored, of columns as they were."""
        return np.ldexp(scale_F, self.exponent_F).astype(BF16)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where nothing is below."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)


def _usable(scale_GF: np.ndarray) -> np.ndarray:
    """Scales to divide by: of a group of zeros, one."""
    return np.where(scale_GF == 0, 1, scale_GF).astype(np.float32)


# ---------------------------------------------------------------------- wint2
def _scatter(count: int) -> np.ndarray:
    """Points [count, 2] in [-0.5, 0.5) that fill the square evenly: the sequence of the plastic number."""
    return (np.arange(1, count + 1)[:, None] * [0.7548776662466927, 0.5698402909980532]) % 1 - 0.5


class _Wint2Search(_Columns):
    """What is best for each column so far: the code's two numbers [2, F], local scales, super scale."""

    def __init__(self, weight_DF: np.ndarray, h_D: np.ndarray | None) -> None:
        super().__init__(weight_DF, h_D)
        self.x_FD = np.ascontiguousarray(self.x_DF.T)
        self.book_2F = np.repeat(np.array(_BEST_BOOK)[:, None], self.num_out, 1)
        self.local_GF, self.super_F = np.zeros(self.xx_GF.shape), np.ones(self.num_out)

    def nearest(
        self, book_2F: np.ndarray, scale_GF: np.ndarray, codes_BF: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """xv and vv of the nearest codewords."""
        from erniekit.ops.cpu.library import call  # loads Paddle

        xv_GF, vv_GF = self.sums()
        code_scale_F, code_zp_F = np.ascontiguousarray(book_2F, np.float32)
        scales = (_usable(scale_GF), code_scale_F, code_zp_F)
        call("wint2_nearest", self.x_FD, self.h_D, *scales, codes_BF, xv_GF, vv_GF, self.num_in, self.num_out)
        return xv_GF, vv_GF

    def choose_book(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The best of `count` codes if every group has its own best scale; xv and vv for it."""
        scale_GF = _STEP * self.rms_GF
        best, best_xv, best_vv = np.full(self.num_out, np.inf), *self.sums()
        for move in [np.zeros(2), *_scatter(count - 1)]:
            book_2F = np.array(_BEST_BOOK) + np.rint(move * _SPREAD) * _GRID
            book_2F = np.repeat(book_2F[:, None], self.num_out, 1)
            xv_GF, vv_GF = self.nearest(book_2F, scale_GF)
            error_F = (self.xx_GF - _ratio(xv_GF**2, vv_GF)).sum(0)
            better_F = error_F < best
            best = np.where(better_F, error_F, best)
            self.book_2F = np.where(better_F, book_2F, self.book_2F)
            best_xv, best_vv = np.where(better_F, xv_GF, best_xv), np.where(better_F, vv_GF, best_vv)
        return best_xv, best_vv

    def choose_super_scale(self, xv_GF: np.ndarray, vv_GF: np.ndarray) -> None:
        """The super scale for which local scales of four bits cost least with the codewords of these sums."""
        wanted_GF, best = _ratio(xv_GF, vv_GF), np.full(self.num_out, np.inf)
        top_F = wanted_GF.max(0)
        for factor in np.geomspace(1.05, 0.4, 48):
            super_F = np.where(top_F > 0, top_F / 15 * factor, 1)
            local_GF = np.clip(np.rint(wanted_GF / super_F), 0, 15)
            error_F = self.errors(local_GF * super_F, xv_GF, vv_GF).sum(0)
            better_F = error_F < best
            best = np.where(better_F, error_F, best)
            self.super_F = np.where(better_F, super_F, self.super_F)
            self.local_GF = np.where(better_F, local_GF, self.local_GF)

    def refit(self) -> None:
        """Neighbouring local scales with the nearest codewords of each, then least squares for the super scale."""
        scale_GF = self.local_GF * self.super_F
        sums = self.nearest(self.book_2F, scale_GF)
        best, best_xv, best_vv = self.errors(scale_GF, *sums), *sums
        for step in (1, -1):
            local_GF = np.clip(self.local_GF + step, 0, 15)
            sums = self.nearest(self.book_2F, local_GF * self.super_F)
            errors_GF = self.errors(local_GF * self.super_F, *sums)
            better_GF = errors_GF < best
            best = np.where(better_GF, errors_GF, best)
            self.local_GF = np.where(better_GF, local_GF, self.local_GF)
            best_xv, best_vv = np.where(better_GF, sums[0], best_xv), np.where(better_GF, sums[1], best_vv)
        fitted_F = _ratio((self.local_GF * best_xv).sum(0), (self.local_GF**2 * best_vv).sum(0))
        self.super_F = np.where(fitted_F > 0, fitted_F, self.super_F)

    def polish(self, count: int) -> None:
        """Small moves of the code's two numbers that lower the error."""
        scale_GF = self.local_GF * self.super_F
        best = self.errors(scale_GF, *self.nearest(self.book_2F, scale_GF)).sum(0)
        for move in _scatter(count):
            moved_2F = self.book_2F + (np.rint(move * _NEAR) * _GRID)[:, None]
            error_F = self.errors(scale_GF, *self.nearest(moved_2F, scale_GF)).sum(0)
            better_F = error_F < best
            best = np.where(better_F, error_F, best)
            self.book_2F = np.where(better_F, moved_2F, self.book_2F)


def _wint2_columns(weight_DF: np.ndarray, h_D: np.ndarray | None, effort: Effort) -> dict[str, np.ndarray]:
    search = _Wint2Search(weight_DF, h_D)
    search.choose_super_scale(*search.choose_book(effort.books))
    for _ in range(effort.rounds):
        search.refit()
    if effort.polish:
        search.polish(effort.polish)
        search.refit()
    super_F = search.super_F.astype(BF16).astype(np.float64)
    codes_BF = np.empty([search.num_in // 4, search.num_out], np.uint8)
    search.nearest(search.book_2F, search.local_GF * super_F, codes_BF)
    local_GF = search.local_GF.astype(np.uint8)
    local_GF = np.concatenate([local_GF, np.zeros_like(local_GF[: len(local_GF) % 2])])
    code_scale_F, code_zp_F = search.book_2F.astype(np.float32)
    return {
        WEIGHT: codes_BF, SCALE: local_GF[::2] << 4 | local_GF[1::2], SUPER: search.super_scales(super_F),
        CODE_SCALE: code_scale_F, CODE_ZP: code_zp_F,
    }  # fmt: skip


# ---------------------------------------------------------------------- wint2.5
class _Wint25Search(_Columns):
    def nearest(self, scale_GF: np.ndarray, words_BF: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """xv and vv of the nearest codewords."""
        from erniekit.ops.cpu.library import call  # loads Paddle

        xv_GF, vv_GF = self.sums()
        sizes = (self.num_in, self.num_out)
        call("wint25_nearest", self.x_DF, self.h_D, _usable(scale_GF), words_BF, xv_GF, vv_GF, *sizes)
        return xv_GF, vv_GF

    def scales(self, sign: int) -> tuple[np.ndarray, np.ndarray]:
        """For each group the best scale of this sign, and its error."""
        best, scale_GF = self.xx_GF.copy(), np.zeros(self.xx_GF.shape)
        for step in _STEPS:
            best, scale_GF = self._better(sign * step * self.rms_GF, best, scale_GF)
        for _ in range(3):
            best, scale_GF = self._better(scale_GF, best, scale_GF)
        return best, scale_GF

    def _better(
        self, tried_GF: np.ndarray, best: np.ndarray, scale_GF: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The least squares of the codewords nearest at a scale, where that is better."""
        xv_GF, vv_GF = self.nearest(tried_GF)
        errors_GF, fitted_GF = self.xx_GF - _ratio(xv_GF**2, vv_GF), _ratio(xv_GF, vv_GF)
        better_GF = (errors_GF < best) & (fitted_GF * tried_GF > 0)
        return np.where(better_GF, errors_GF, best), np.where(better_GF, fitted_GF, scale_GF)


def _wint25_columns(weight_DF: np.ndarray, h_D: np.ndarray | None) -> dict[str, np.ndarray]:
    search = _Wint25Search(weight_DF, h_D)
    (up, up_GF), (down, down_GF) = search.scales(1), search.scales(-1)
    scale_GF = np.where(up.sum(0) <= down.sum(0), up_GF, down_GF)
    top_F = scale_GF[np.abs(scale_GF).argmax(0), np.arange(search.num_out)]
    # A little more than 1 / 8191 of the largest: rounded to bf16 it must not be less.
    super_F = (top_F / 8191 * (1 + 2.0**-8)).astype(BF16).astype(np.float64)
    local_GF = np.rint(scale_GF / np.where(super_F == 0, 1, super_F)).astype(np.int64)
    words_BF = np.empty([search.num_in // GROUP * WORDS, search.num_out], np.uint16)
    search.nearest(local_GF * super_F, words_BF)
    words_BF[WORDS - 1 :: WORDS] |= local_GF.astype(np.uint16)
    return {WEIGHT: words_BF.view(np.int16), SUPER: search.super_scales(super_F)}
