"""Which rows a stream wants, known from the token tables before any activation is read.

A filter looks at flags (special tokens, images, roles), at the document's key (held-out split) and
at the lengths that a store keeps of its rows (outliers).
Its result is kept as one bit a row in an unnamed temporary file, so that memory does not grow with
the store; the rows of each unit are counted, so the length of an epoch is exact from the start.

Cost: reading 9 bytes a row once, and a count of 4 bytes a unit.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.store.layout import Modality
from actcache.store.layout import eligible as by_flags
from actcache.store.split import held_out
from saetrain.errors import ConfigError
from saetrain.stream.aligned import AnySegment

Split = Literal["train", "held_out", "all"]
_SPLITS = ("train", "held_out", "all")
_IN_MEMORY = 16 << 20  # bytes of bits: beyond 134 million rows they go to disk


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """Rows to keep. Raises ConfigError for a split or fraction that is none."""

    split: Split = "train"
    held_out_fraction: float = 0.05  # of the documents
    skip_special: bool = True
    modality: Modality = "all"
    roles: tuple[str, ...] | None = None  # None: all
    max_norm: float | None = None  # longest row, in mean lengths of its hook; None: any

    def __post_init__(self) -> None:
        if self.split not in _SPLITS:
            raise ConfigError(f"split={self.split}: expected one of {', '.join(_SPLITS)}")
        if not 0.0 <= self.held_out_fraction < 1.0:
            raise ConfigError(
                f"held_out_fraction={self.held_out_fraction}: expected 0 <= fraction < 1"
            )

        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(f"max_norm={self.max_norm}: expected a number above 0")

    def keep(self, flags: NDArray[np.uint8], doc: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool from two columns of a token table; `max_norm` is not looked at."""
        keep = by_flags(
            flags, skip_special=self.skip_special, modality=self.modality, roles=self.roles
        )
        if self.split != "all":
            keep &= held_out(doc, self.held_out_fraction) == (self.split == "held_out")
        return keep

    def to_json(self) -> dict[str, Any]:
        """For a stream's state."""
        return asdict(self) | {"roles": None if self.roles is None else list(self.roles)}


class EligibleRows:
    """The units of a list of segments and the rows that a filter keeps of each."""

    def __init__(
        self,
        segments: Sequence[AnySegment],
        unit_rows: Sequence[int],
        wanted: RowFilter,
        threads: int = 2,
        mean_norms: Mapping[str, float] | None = None,
    ) -> None:
        """`unit_rows[s]` is how many rows of segment `s` make a unit.

        `mean_norms` are those of the hooks that `wanted.max_norm` is about. Raises StoreError if
        it is given and the store has no lengths of rows.
        """
        sizes = np.array([s.n_rows for s in segments], dtype=np.int64)
        self._unit_rows = np.array(unit_rows, dtype=np.int64)
        units = -(-sizes // self._unit_rows)
        self._sizes, self._mean_norms = sizes, mean_norms or {}
        self._first_unit = np.concatenate([[0], np.cumsum(units)])
        self._bounds: list[int] = self._first_unit.tolist()
        self._first_byte = np.concatenate([[0], np.cumsum(-(-sizes // 8))])
        self._bits = _bytes(int(self._first_byte[-1]))
        self.counts = np.zeros(int(self._first_unit[-1]), dtype=np.int32)
        with ThreadPoolExecutor(threads, "filter") as pool:
            list(pool.map(lambda s: self._look(s, segments[s], wanted), range(len(segments))))
        self.n_rows = int(self.counts.sum(dtype=np.int64))

    def _look(self, s: int, segment: AnySegment, wanted: RowFilter) -> None:
        keep = wanted.keep(segment.column("flags"), segment.column("doc"))
        if wanted.max_norm is not None:
            for hook, mean in self._mean_norms.items():
                keep &= segment.norms(hook) <= wanted.max_norm * mean
        self._bits[self._first_byte[s] : self._first_byte[s + 1]] = np.packbits(keep)
        starts = np.arange(0, len(keep), self._unit_rows[s])
        self.counts[self._first_unit[s] : self._first_unit[s + 1]] = np.add.reduceat(
            keep.astype(np.int32), starts
        )

    def __len__(self) -> int:
        """Number of units."""
        return len(self.counts)

    def place(self, unit: int) -> tuple[int, int, int]:
        """(segment, first row, end row) of a unit."""
        s = bisect_right(self._bounds, unit) - 1
        first = (unit - int(self._first_unit[s])) * int(self._unit_rows[s])
        return s, first, min(first + int(self._unit_rows[s]), int(self._sizes[s]))

    def rows(self, unit: int) -> tuple[int, NDArray[np.int64]]:
        """(segment, numbers of the eligible rows in it) of a unit."""
        s, first, end = self.place(unit)
        if self.counts[unit] == end - first:
            return s, np.arange(first, end)
        byte = int(self._first_byte[s])
        bits = np.unpackbits(self._bits[byte + first // 8 : byte + -(-end // 8)])
        begin = first % 8
        return s, first + np.flatnonzero(bits[begin : begin + end - first])


def _bytes(n: int) -> NDArray[np.uint8]:
    if n <= _IN_MEMORY:
        return np.zeros(n, dtype=np.uint8)
    with tempfile.TemporaryFile(prefix="saetrain-rows-") as file:
        file.truncate(n)
        return np.memmap(file, dtype=np.uint8, mode="r+")
