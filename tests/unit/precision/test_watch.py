"""What the guards count, by hand."""

import numpy as np
import paddle
import pytest

from erniekit.ops.float8 import E4M3, Rows, Tensor, quantise
from erniekit.precision.watch import Watch


def seen(watch):
    return watch.told(watch.figures(), details=True)


def test_what_casts_did():
    watch = Watch(["a", "b"])
    watch.begin(looking=True, comparing=False)
    x = paddle.zeros([2, 128])
    x[0, 0], x[0, 1], x[1, 0] = 448.0, 2.0**-12, -3.0  # the second is below the smallest subnormal, 2^-9
    watch.saw("b", "x", given=x, cast=quantise(x, Rows(128), kind=E4M3))
    watch.saw("b", "g", given=x, cast=quantise(x, Tensor(), kind=E4M3, scale=paddle.to_tensor(0.5)))
    told = seen(watch)
    assert told["a"]["amax"] == 0.0
    assert (told["b"]["amax_x"], told["b"]["underflow_x"], told["b"]["overflow_x"]) == (448.0, 1 / 256, 0.0)
    assert told["b"]["overflow_g"] == 1 / 256 and told["b"]["overflow"] == told["b"]["overflow_g"]
    assert told["b"]["amax_w"] == 0.0
    assert set(watch.told(watch.figures(), details=False)["b"]) == {"amax", "underflow", "overflow"}


def test_a_pass_that_is_taken_again_counts_once():
    watch = Watch(["a"])
    watch.begin(looking=True, comparing=True)
    for size in (1.0, 5.0, 2.0):
        x = paddle.full([1, 128], size)
        watch.saw("a", "x", given=x, cast=quantise(x, Rows(128), kind=E4M3))
    watch.saw("a", "x", given=x[:0], cast=quantise(x[:0], Rows(128), kind=E4M3))  # an expert without tokens
    assert seen(watch)["a"]["amax"] == 5.0
    watch.begin(looking=True, comparing=True)
    assert not watch.figures().any()


def test_outputs_that_are_far_off(capsys):
    watch = Watch([f"layer {i}" for i in range(6)])
    watch.begin(looking=False, comparing=True)
    exact = paddle.ones([4])
    for i in range(6):
        watch.compared(f"layer {i}", exact * (1.0 + 0.1 * i), exact=exact)
    watch.compared("layer 0", exact[:0], exact=exact[:0])
    off = watch.warn_of(7, watch.figures())
    assert off == pytest.approx({f"layer {i}": 0.1 * i for i in range(6)}, abs=1e-6)
    text = capsys.readouterr().err
    assert "step 7" in text and "layer 5 by 50%, layer 4 by 40%, layer 3 by 30% (and 1 more)" in text
    watch.begin(looking=False, comparing=True)
    watch.warn_of(8, np.zeros_like(watch.figures()))
    assert capsys.readouterr().err == ""
