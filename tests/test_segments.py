"""Rows of a segment: the cheap check for finite values against numpy's own."""

import numpy as np
import pytest
import torch

from actcache.segments import _finite

LARGEST = float(torch.finfo(torch.float32).max)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [60_000.0] * 64,  # their sum is beyond float16
        [LARGEST, LARGEST, -1.0],  # and this one beyond float32; as float16 they are infinite
        [float("inf"), 1.0],
        [float("inf"), float("-inf")],  # cancel to NaN
        [float("nan"), 1.0],
    ],
)
def test_finite_is_what_numpy_says(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype)[None]
    assert _finite(x) == bool(np.isfinite(x.float().numpy()).all())
