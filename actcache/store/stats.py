"""Statistics of one hook over rows of activations, exact to merge.

n, per-channel mean and M2 (sum of squared deviations), E||x||, max |x| and the count of non-finite
values, in float64; two halves merge with the pairwise update of Chan, Golub and LeVeque (1983), so
the result does not depend on how the rows were split beyond float64 rounding.
"""

from __future__ import annotations

import base64
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actcache.store.errors import DamagedError

_BLOCK = 1 << 17  # values worked on at a time: they stay in the cache
_LARGEST = 3.5e38  # above the largest float32 and bfloat16


@dataclass(frozen=True)
class HookStats:
    """Statistics of n rows of width d."""

    n: int
    mean: NDArray[np.float64]  # (d,)
    m2: NDArray[np.float64]  # (d,)
    sum_norm: float  # sum of ||x||
    max_abs: float
    nonfinite: int  # values that are NaN or infinite; a committed segment has none

    @classmethod
    def empty(cls, d: int) -> Self:
        return cls(0, np.zeros(d), np.zeros(d), 0.0, 0.0, 0)

    @classmethod
    def of(cls, x: NDArray[Any], some: NDArray[np.intp] | None = None) -> Self:
        """Statistics of rows x (n, d), any float type; of the rows numbered `some`, if given.

        Those are the statistics of x[some], bit for bit, without a copy of all of them.
        Storage types are worked on in float32 and summed in float64: the mean is that of float64,
        M2 is within 1e-7 of it and the norms within 1e-6, at ten times the speed.
        """
        total = cls.empty(x.shape[1])
        rows = max(1, _BLOCK // x.shape[1])
        for start in range(0, len(x) if some is None else len(some), rows):
            block = slice(start, start + rows)
            total = total.merge(cls._block(wide(x[block if some is None else some[block]])))
        return total

    @classmethod
    def _block(cls, x: NDArray[Any]) -> Self:
        """Few rows, float32 or float64."""
        with np.errstate(invalid="ignore", over="ignore"):
            mean = np.add.reduce(x, axis=0, dtype=np.float64) / len(x)
            m2 = np.add.reduce(np.square(x - mean.astype(x.dtype)), axis=0, dtype=np.float64)
            norms = np.sqrt(np.einsum("ij,ij->i", x, x))
        nonfinite = 0
        if not np.isfinite(mean).all():
            nonfinite = int(np.size(x) - np.count_nonzero(np.isfinite(x)))
        largest = float(max(x.max(), -x.min()))
        return cls(len(x), mean, m2, float(norms.sum(dtype=np.float64)), largest, nonfinite)

    def merge(self, other: Self) -> Self:
        """Statistics of both sets of rows together."""
        if not (self.n and other.n):
            return other if other.n else self
        n = self.n + other.n
        delta = other.mean - self.mean
        return type(self)(
            n,
            self.mean + delta * (other.n / n),
            self.m2 + other.m2 + np.square(delta) * (self.n * other.n / n),
            self.sum_norm + other.sum_norm,
            max(self.max_abs, other.max_abs),
            self.nonfinite + other.nonfinite,
        )

    @classmethod
    def merged(cls, parts: Iterable[Self], d: int) -> Self:
        """Statistics of all sets of rows together; of none, those of no rows of width d.

        Its arrays cannot be written: whoever keeps the result may hand it out many times.
        """
        total = cls.empty(d)
        for part in parts:
            total = total.merge(part)
        for array in (total.mean, total.m2):
            array.flags.writeable = False
        return total

    @property
    def mean_norm(self) -> float:
        """E||x||; NaN where there are no rows."""
        return self.sum_norm / self.n if self.n else math.nan

    @property
    def variance(self) -> float:
        """Total variance E||x - mean||^2, summed over channels; NaN where there are no rows."""
        return float(self.m2.sum()) / self.n if self.n else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "mean": _pack(self.mean),
            "m2": _pack(self.m2),
            "sum_norm": self.sum_norm,
            "max_abs": self.max_abs,
            "nonfinite": self.nonfinite,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], d: int) -> Self:
        """Raises DamagedError if the record is not what `to_json` writes for width d."""
        try:
            stats = cls(
                _count(record["n"]),
                _unpack(record["mean"], d),
                _unpack(record["m2"], d),
                _number(record["sum_norm"]),
                _number(record["max_abs"]),
                _count(record["nonfinite"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise DamagedError(f"statistics record is malformed: {e}") from e
        if len(record) != len(fields(cls)) or not stats._possible():
            raise DamagedError(
                "statistics record is impossible: non-finite, negative, or beyond its own max_abs"
            )
        return stats

    def _possible(self) -> bool:
        """Whether some finite rows of at most 32-bit floats have these statistics."""
        if not math.isfinite(self.sum_norm) or not 0 <= self.max_abs < _LARGEST:
            return False
        top = self.max_abs * (1 + 1e-6)  # rounding of float64 sums
        norms = self.n * math.sqrt(len(self.mean)) * top
        return bool(
            (np.abs(self.mean) <= top).all()  # False for NaN
            and ((self.m2 >= 0) & (self.m2 <= self.n * top**2)).all()
            and 0 <= self.sum_norm <= norms
            and self.nonfinite == 0
        )


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 48:
        raise ValueError(f"expected a count, got {value!r:.40}")
    return value


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value)


def wide(x: NDArray[Any]) -> NDArray[Any]:
    """The same values as float32, or float64 if they are; bfloat16 is the top half of a float32."""
    if x.dtype.name == "bfloat16":
        return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def _pack(x: NDArray[np.float64]) -> str:
    return base64.b64encode(x.astype("<f8").tobytes()).decode()


def _unpack(text: str, d: int) -> NDArray[np.float64]:
    if len(text) > 4 * (8 * d // 3 + 2):
        raise ValueError(f"array is longer than {d} channels")
    x = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")
    if len(x) != d:
        raise ValueError(f"expected {d} channels, got {len(x)}")
    return x.astype(np.float64)


class MergedStats(ABC):
    """What has statistics of its segments together, such as a snapshot; merged when first asked.

    They are kept: runs ask often, and of thousands of commits.
    """

    @property
    @abstractmethod
    def segments(self) -> Sequence[Any]:
        """Each with `stats(hook, special)` of its own."""

    @property
    @abstractmethod
    def hooks(self) -> Mapping[str, Any]:
        """Hooks by stored name, each with its width `d`."""

    @abstractmethod
    def resolve_hook(self, name: str) -> str:
        """The stored name of a hook."""

    def stats(self, hook: str, special: bool = False) -> HookStats:
        """Statistics of a hook over all segments, without or with special tokens."""
        key = (name := self.resolve_hook(hook), special)
        if key not in self._stats:
            parts = (segment.stats(*key) for segment in self.segments)
            self._stats[key] = HookStats.merged(parts, self.hooks[name].d)
        return self._stats[key]

    @cached_property
    def _stats(self) -> dict[tuple[str, bool], HookStats]:
        return {}
