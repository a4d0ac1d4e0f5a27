"""The order of an epoch: which units are read together, and how their rows are shuffled.

A unit is a run of neighbouring inner chunks of one segment, read at once. Units are visited in a
keyed pseudo-random order (a Feistel network on [0, n) with cycle walking), so the order of a store
of any size is a function of a key and takes no memory. Consecutive units form a window; the
eligible rows of a window are shuffled as a whole. The rows of an epoch are thereby one fixed
sequence, batch `step` is its rows [step B, (step + 1) B), and nothing depends on who reads it.

Bias: two rows of different units share a window with probability of about window / store, wherever
they lie; inside a window sampling is without replacement. Cost: 10 ns per unit and walk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.store.split import splitmix64

_ROUNDS = 4
_BLOCK = 4096  # units looked up at once


def feistel(i: NDArray[np.int64], n: int, key: str) -> NDArray[np.int64]:
    """The places of `i` under a keyed permutation of range(n), elementwise.

    A balanced Feistel network of four rounds over the smallest square of a power of two that
    holds n; results outside [0, n) are put through it again until they fall inside (cycle
    walking, Black and Rogaway 2002), at most four times on average.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u8")
    x = np.asarray(i, dtype=np.uint64)
    if len(x) and int(x.max()) >= n:
        raise ValueError(f"expected numbers below {n}, got {int(x.max())}")
    found = _rounds(x, half, keys)
    while (outside := found >= n).any():
        found[outside] = _rounds(found[outside], half, keys)
    return found.astype(np.int64)


def _rounds(x: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    with np.errstate(over="ignore"):
        for r in range(_ROUNDS):
            left, right = right, left ^ (splitmix64(right + keys[r]) & mask)
    joined: NDArray[np.uint64] = (left << shift) | right
    return joined


def shuffled(n: int, key: str) -> NDArray[np.int64]:
    """A permutation of range(n), n < 2**24, that depends on `key` alone.

    Rows are sorted by a keyed hash with the row number in its low bits: ties cannot occur, so any
    sort gives the same order. Faster than a Feistel network where all of it is wanted.
    """
    if n >= 1 << 24:
        raise ValueError(f"expected fewer than {1 << 24:,} rows in a window, got {n:,}")
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], dtype="<u8")
    low = np.uint64((1 << 24) - 1)
    row = np.arange(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        ranks = (splitmix64(row + seed) & ~low) | row
    ranks.sort()
    return (ranks & low).astype(np.int64)


@dataclass(frozen=True)
class Window:
    """Units that are read together."""

    first: int  # number of its first row in the epoch
    n_rows: int  # eligible rows
    units: NDArray[np.int64]  # in the order of the epoch
    key: str | None  # of its shuffle; None: rows stay in stored order

    def order(self) -> NDArray[np.int64]:
        """(n_rows,): which of the window's rows, unit after unit, stands at each place."""
        if self.key is None:
            return np.arange(self.n_rows)
        return shuffled(self.n_rows, self.key)


def windows(
    eligible: NDArray[np.int32],
    *,
    window_rows: int,
    key: str,
    shuffle_units: bool = True,
    shuffle_rows: bool = True,
    skip_rows: int = 0,
) -> Iterator[Window]:
    """Windows of at least `window_rows` eligible rows (the last may have fewer), in epoch order.

    `eligible` is (M,), the rows of each unit. Windows that end before row `skip_rows` of the epoch
    are left out.
    """
    first, rows, number, group = 0, 0, 0, list[int]()
    for begin in range(0, len(eligible), _BLOCK):
        block = np.arange(begin, min(begin + _BLOCK, len(eligible)))
        units = feistel(block, len(eligible), key) if shuffle_units else block
        for unit, n in zip(units.tolist(), eligible[units].tolist(), strict=True):
            if not n:
                continue  # nothing to read it for
            group.append(unit)
            rows += n
            if rows < window_rows:
                continue
            if first + rows > skip_rows:
                yield _window(first, rows, group, key, number, shuffle_rows)
            first, rows, number, group = first + rows, 0, number + 1, []
    if rows and first + rows > skip_rows:
        yield _window(first, rows, group, key, number, shuffle_rows)


def _window(first: int, rows: int, units: list[int], key: str, n: int, shuffle: bool) -> Window:
    return Window(first, rows, np.array(units), f"{key}/{n}" if shuffle else None)
