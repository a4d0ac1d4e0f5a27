"""int8 rows against the formulas written out."""  # F112

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from actcache.store import StoreError
from actcache.store.int8 import Calibration, dequantise, quantise, store_rows
from actcache.store.stats import HookStats


def rows(n=3000, d=48, massive=(3, 17), seed=0):
    """Normal rows; a few channels 1000 times larger, about a mean as large."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.3, 1.0, (n, d)) * rng.uniform(0.5, 2.0, d)
    x[:, list(massive)] = x[:, list(massive)] * 1000 + 5000
    return x.astype(np.float32)


def test_codes_follow_the_formula():
    x = rows()
    calibration = Calibration.of(HookStats.of(x))
    np.testing.assert_allclose(calibration.mean, x.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(calibration.std, x.std(0, dtype=np.float64), rtol=1e-6)
    codes, scale = quantise(x, calibration)
    y = (x.astype(np.float64) - calibration.mean) / calibration.std
    top = np.abs(y).max(1)
    np.testing.assert_allclose(scale, top / 127, rtol=1e-5)
    assert_array_equal(np.abs(codes).max(1), 127)  # the whole range is used, -128 never
    assert np.abs(codes - y / (top[:, None] / 127)).max() <= 0.501
    back = dequantise(codes, scale, calibration.mean, calibration.std)
    exact = calibration.mean + calibration.std * (scale[:, None] * codes).astype(np.float64)
    np.testing.assert_allclose(back, exact, rtol=3e-7, atol=1e-5)
    assert (np.abs(x - back) <= calibration.std * scale[:, None] * 0.501 + 1e-3).all()


def test_a_massive_channel_costs_the_others_nothing():
    x = rows()
    plain = np.ones(len(x), dtype=bool)
    _, stats, rest, error = store_rows(x, Calibration.of(HookStats.of(x)), plain)
    back = decoded(x)
    centred = x - x.mean(0, dtype=np.float64)
    fvu = np.square(x - back, dtype=np.float64).sum() / np.square(centred).sum()
    assert error.fvu is not None
    np.testing.assert_allclose(error.fvu, fvu, rtol=1e-3)  # by the variance of what is stored
    assert fvu < 1e-3
    # Channel by channel, too: the small ones would vanish under one scale for all.
    each = np.square(x - back, dtype=np.float64).mean(0) / x.var(0, dtype=np.float64)
    assert each.max() < 1e-3
    naive = Calibration(np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32))
    codes, scale = quantise(x, naive)
    lost = np.square(x - codes * scale[:, None], dtype=np.float64).mean(0) / x.var(0)
    assert np.median(lost) > 0.5
    np.testing.assert_allclose(stats.mean, back.mean(0, dtype=np.float64), rtol=1e-6)
    assert (stats.n, rest.n) == (len(x), 0)


def decoded(x, calibration=None):
    calibration = calibration or Calibration.of(HookStats.of(x))
    return dequantise(*quantise(x, calibration), calibration.mean, calibration.std)


def test_the_error_is_that_of_plain_rows_and_the_worst_of_all():
    x = rows(400)
    x[7] *= 50  # a special token far away: it must not count in the FVU, it may be the worst
    plain = np.arange(400) != 7
    calibration = Calibration.of(HookStats.of(x[plain]))
    _, stats, rest, error = store_rows(x, calibration, plain)
    back = decoded(x, calibration)
    lost = np.square(x - back, dtype=np.float64).sum(1)
    variance = np.square(back[plain] - back[plain].mean(0, dtype=np.float64)).sum()
    relative = np.sqrt(lost / np.square(x - calibration.mean, dtype=np.float64).sum(1))
    assert error.fvu is not None
    np.testing.assert_allclose(error.fvu, lost[plain].sum() / variance, rtol=1e-4)
    np.testing.assert_allclose(error.max_relative_error, relative.max(), rtol=1e-4)
    assert (stats.n, rest.n) == (399, 1)


def test_constant_channels_are_exact_and_a_later_value_in_them_is_not_lost():
    x = rows(500, 12, massive=())
    x[:, 5], x[:, 6] = 0.1, 0.0
    calibration = Calibration.of(HookStats.of(x))
    back = decoded(x, calibration)
    assert_array_equal(back[:, [5, 6]], x[:, [5, 6]])
    later = x[:1].copy()
    later[0, 5] = 3.0
    again = decoded(later, calibration)
    assert abs(again[0, 5] - 3.0) < 0.02
    constant = np.full((9, 3), 7.25, np.float32)
    assert_array_equal(decoded(constant), constant)  # σ = 0 in all channels


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_any_float_type_and_any_cut_of_the_rows(dtype):
    x = rows(4000, massive=()).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    calibration = Calibration.of(HookStats.of(x))
    codes, scale = quantise(x, calibration)
    parts = [quantise(x[i : i + 700], calibration) for i in range(0, 4000, 700)]
    assert_array_equal(codes, np.concatenate([c for c, _ in parts]))
    assert_array_equal(scale, np.concatenate([s for _, s in parts]))
    out = np.empty(x.shape, np.float32)
    given = dequantise(codes, scale, calibration.mean, calibration.std, out=out)
    assert given is out
    assert_array_equal(out[5:9], dequantise(codes[5:9], scale[5:9], *calibration.array))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = rows(50)
    calibration = Calibration.of(HookStats.of(x))
    x[11, 2] = bad
    with pytest.raises(StoreError, match="NaN, infinite or beyond float32"):
        quantise(x, calibration)
    with pytest.raises(StoreError, match="finite activations to calibrate"):
        Calibration.of(HookStats.of(x))


@given(st.integers(0, 1 << 30), st.floats(-15, 15), st.floats(-6, 3))
@settings(max_examples=40, deadline=None)
def test_half_a_step_whatever_the_scale_and_the_tokens_after_the_calibration(seed, size, outlier):
    rng = np.random.default_rng(seed)
    seen = (rng.normal(size=(60, 8)) * 10.0**size).astype(np.float32)
    calibration = Calibration.of(HookStats.of(seen))
    x = (seen * 10.0**outlier)[:20].astype(np.float32)
    codes, scale = quantise(x, calibration)
    assert np.abs(codes.astype(int)).max() <= 127
    back = dequantise(codes, scale, calibration.mean, calibration.std)
    step = calibration.std.astype(np.float64) * scale[:, None]
    assert (np.abs(back - x.astype(np.float64)) <= 0.5001 * step + 1e-6 * np.abs(x)).all()
