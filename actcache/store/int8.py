"""int8 rows: one scale per token, after (x - mean) / std per channel. The maths; numpy only.

A few channels of a residual stream are hundreds of times larger than the rest, so one scale per
token leaves nothing of the others: 7 to 23 % of the variance is lost. With every channel brought to
mean 0 and standard deviation 1 first, 0.007 % is. Mean and std are a calibration, made once per
hook from the first million tokens and part of every segment; a token's scale is its largest
normalised value over 127, so no value is ever clipped, whatever comes after the calibration.

    code = rint((x - mean) / std / scale)        x ≈ mean + std · scale · code

Bias: rounding to nearest, at most half a step of std · scale. Cost: 1 byte a value and 4 a token.
Shapes: N rows of D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.store.errors import StoreError
from actcache.store.ids import bytes_digest
from actcache.store.stats import HookStats, wide

CALIBRATION_ROWS = 1_000_000  # rows without special tokens that a calibration sees
LEVELS = 127
_FLOOR = 1e-3  # smallest std, in units of the median channel's
_NOTHING = 1e-30  # a token no farther than this from the mean is the mean
_BLOCK = 1 << 17  # values worked on at a time: they stay in the cache

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of each channel, (D,) float32; every std is positive."""

    mean: F32
    std: F32

    @classmethod
    def of(cls, stats: HookStats) -> Calibration:
        """The calibration that `stats` give.

        Channels that hardly vary get 1/1000 of the median channel's std: a channel that was
        constant is stored exactly as long as it stays so, and a value that leaves it later costs
        its token some precision instead of all. Raises StoreError if a value was not finite.
        """
        with np.errstate(invalid="ignore"):
            std = np.sqrt(stats.m2 / max(1, stats.n))
        if stats.nonfinite or not np.isfinite(std).all() or not np.isfinite(stats.mean).all():
            raise StoreError("int8 needs finite activations to calibrate on; these hold NaN or inf")
        varies = std > 1e-7 * np.abs(stats.mean)  # more than rounding of a constant
        floor = _FLOOR * float(np.median(std[varies])) if varies.any() else 1.0
        std = np.maximum(np.where(varies, std, 0.0), floor).astype(np.float32)
        # Underflow of float32 would divide by zero.
        return cls(stats.mean.astype(np.float32), np.maximum(std, np.float32(1e-30)))

    @property
    def array(self) -> F32:
        """(2, D): mean, std; as it is stored."""
        return np.stack([self.mean, self.std])

    @classmethod
    def from_array(cls, array: F32) -> Calibration:
        """Raises StoreError if no calibration can have these values."""
        if not np.isfinite(array).all() or not (array[1] > 0).all():
            raise StoreError("a calibration needs finite means and positive standard deviations")
        return cls(array[0], array[1])

    @cached_property
    def digest(self) -> str:
        """Of the little-endian bytes of `array`."""
        return bytes_digest(np.ascontiguousarray(self.array, dtype="<f4").tobytes())


@dataclass(frozen=True)
class Int8Rows:
    """Rows as they are stored."""

    codes: NDArray[np.int8]  # (N, D)
    scale: F32  # (N,)
    calibration: Calibration


@dataclass(frozen=True)
class Error:
    """What storage has changed."""

    fvu: float | None  # sum |x - x̂|² / sum |x̂ - mean of x̂|², without special tokens; None: 0/0
    max_relative_error: float  # largest |x - x̂| / |x - calibrated mean| of a row, special or not

    def __str__(self) -> str:
        lost = "none of no variance" if self.fvu is None else f"{self.fvu:.2g} of the variance"
        return f"storage loses {lost}, at most {self.max_relative_error:.2g} of a row's length"


def quantise(x_ND: NDArray[Any], calibration: Calibration) -> tuple[NDArray[np.int8], F32]:
    """Codes (N, D) and scales (N,) of rows of any float type.

    Raises StoreError if a value is not finite, or so far out that float32 cannot normalise it.
    """
    codes = np.empty(x_ND.shape, dtype=np.int8)
    scale = np.empty(len(x_ND), dtype=np.float32)
    inverse = np.float32(1) / calibration.std
    for rows in _blocks(x_ND.shape):
        codes[rows], scale[rows] = _quantise(wide(x_ND[rows]), calibration.mean, inverse)
    return codes, scale


def _quantise(x: NDArray[Any], mean: F32, inverse: F32) -> tuple[NDArray[np.int8], F32]:
    """Of few rows."""
    with np.errstate(over="ignore", invalid="ignore"):
        y: F32 = np.subtract(x, mean, dtype=np.float32)
        y *= inverse
        scale: F32 = np.maximum(y.max(axis=1), -y.min(axis=1)) / np.float32(LEVELS)
    if not np.isfinite(scale).all():
        raise StoreError("int8 cannot hold values that are NaN, infinite or beyond float32")
    scale[scale < _NOTHING] = 0
    y *= np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)[:, None]
    return np.rint(y, out=y).astype(np.int8), scale


def dequantise(
    codes_ND: NDArray[np.int8], scale_N: F32, mean_D: F32, std_D: F32, out: F32 | None = None
) -> F32:
    """Rows (N, D) in float32: mean + std · (scale · code), rounded in this order.

    `out` (N, D) float32 is filled and returned if it is given. Values are the same however rows
    are cut into calls.
    """
    x: F32 = np.empty(codes_ND.shape, dtype=np.float32) if out is None else out
    for rows in _blocks(codes_ND.shape):
        part = x[rows]
        part[...] = codes_ND[rows]
        part *= scale_N[rows, None]
        part *= std_D
        part += mean_D
    return x


def store_rows(
    x_ND: NDArray[Any], calibration: Calibration, plain_N: NDArray[np.bool_]
) -> tuple[Int8Rows, HookStats, HookStats, Error]:
    """Rows as int8, statistics of what they decode to (plain rows, others), and the error.

    `plain_N` says which rows are not special tokens. Raises as `quantise`.
    """
    n, d = x_ND.shape
    stored = Int8Rows(np.empty((n, d), np.int8), np.empty(n, np.float32), calibration)
    inverse = np.float32(1) / calibration.std
    plain, special = HookStats.empty(d), HookStats.empty(d)
    lost, largest = 0.0, 0.0
    for rows in _blocks(x_ND.shape):
        x, some = wide(x_ND[rows]), plain_N[rows]
        stored.codes[rows], stored.scale[rows] = _quantise(x, calibration.mean, inverse)
        back = dequantise(stored.codes[rows], stored.scale[rows], calibration.mean, calibration.std)
        error, size = _squares(x - back), _squares(x - calibration.mean)
        lost += float(error[some].sum())
        ratio = np.divide(error, size, out=np.zeros_like(error), where=error > 0)
        largest = max(largest, float(ratio.max()))
        plain = plain.merge(HookStats.of(back[some])) if some.any() else plain
        special = special if some.all() else special.merge(HookStats.of(back[~some]))
    if not np.isfinite([lost, largest]).all():
        raise StoreError("int8 cannot hold values this close to the largest of float32")
    total = float(plain.m2.sum())
    return stored, plain, special, Error(lost / total if total > 0 else None, largest**0.5)


def _squares(x: NDArray[Any]) -> NDArray[np.float64]:
    """Squared length of each row, (n,); summed in x's own type, which is five times faster."""
    sums: NDArray[np.float64] = np.einsum("ij,ij->i", x, x).astype(np.float64)
    return sums


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, start + step)
