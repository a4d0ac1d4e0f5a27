"""int8 storage against the formulas written out, zarr-python, zarrs and TensorStore."""  # F112

import numpy as np
from numpy.testing import assert_array_equal

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
