"""How many of the first n rows of a mix each store has: low discrepancy, closed form, any n.

Store 1 has round(w1 n) of the first n rows, store 2 its share of what is left, rounded alike, and
so on, heaviest first: rounding errors of one batch are made up for by the next (error diffusion).
With every row one count grows by one and none shrinks, so any cut into batches works. When a store
has no rows left the others go on with their weights among themselves.

Bias: off the exact share by half a row for the heaviest store, by less than one of two or three
stores, by a row or two of many. Cost: exact fractions, some 10 µs a call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_HALF = Fraction(1, 2)


def split(weights: Sequence[Fraction], n: int) -> list[int]:
    """`n` rows by weight, adding up to n. `weights` add up to 1, heaviest first."""
    left, rest, found = Fraction(1), n, list[int]()
    for w in weights[:-1]:
        found.append(int(w / left * rest + _HALF))
        left, rest = left - w, rest - found[-1]
    return [*found, rest]


@dataclass(frozen=True)
class _Phase:
    """Rows from `first` on, while the same stores last."""

    first: int
    before: tuple[int, ...]  # rows of each store ahead of it
    stores: tuple[int, ...]  # heaviest first
    weights: tuple[Fraction, ...]  # of these stores, adding up to 1

    def counts(self, n: int) -> list[int]:
        found = list(self.before)
        for store, more in zip(self.stores, split(self.weights, n - self.first), strict=True):
            found[store] += more
        return found


class Apportion:
    """Counts of each store among the first n rows of a mix."""

    def __init__(self, weights: Sequence[Fraction], rows: Sequence[int]) -> None:
        """`weights` add up to 1; `rows` is how many each store has in all."""
        self.n_rows = sum(rows)
        order = sorted(range(len(rows)), key=lambda i: (-weights[i], i))
        self._phases: list[_Phase] = []
        first, before = 0, [0] * len(rows)
        stores = tuple(order)  # at first all, also one that has no rows
        while not self._phases or stores:
            total = sum((weights[i] for i in stores), Fraction(0))
            shares = tuple(weights[i] / total for i in stores)
            phase = _Phase(first, tuple(before), stores, shares)
            self._phases.append(phase)
            first = _last(phase, rows, self.n_rows)
            before = phase.counts(first)
            stores = tuple(i for i in order if before[i] < rows[i])
        self._starts = [p.first for p in self._phases]

    @property
    def together(self) -> int:
        """Rows until the first store has no more."""
        return self._starts[1] if len(self._starts) > 1 else self.n_rows

    def __call__(self, n: int) -> list[int]:
        """Rows of each store among the first `n`, at most `n_rows`."""
        return self._phases[bisect_right(self._starts, n) - 1].counts(n)


def _last(phase: _Phase, rows: Sequence[int], n_rows: int) -> int:
    """The largest n for which no store needs more rows than it has; counts grow, so bisect."""
    low, high = phase.first, n_rows + 1
    while high - low > 1:
        n = (low + high) // 2
        if all(a <= b for a, b in zip(phase.counts(n), rows, strict=True)):
            low = n
        else:
            high = n
    return low
