"""What a pass over the store remembers of each latent: counts, sums, and its K best contexts.

A context, named (segment, ctx), offers one peak per latent: its largest activation, the earliest
position on a tie. The K best peaks of a latent are ordered by falling value, then (segment, ctx).
Both are exact, whatever the batches, and states of different segments merge to the state of all of
them, so segments can be shared out among ranks. Contexts never cross segments; rows of one segment
may come in any order, so its peaks stay open until the next segment starts.

Cost: 24 bytes per latent and kept context, and while a segment is open 24 bytes per (latent,
context) that fires in it. Nothing of size rows x latents is made from sparse codes.

Shapes: B rows in a batch, F latents, K contexts kept per latent, N peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.store import TokenTable
from saetrain.codes import Codes, SparseCodes
from saetrain.errors import TrainingError

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_PENDING = 1 << 22  # peaks of an open segment before they are reduced to one per context


@dataclass(frozen=True)
class Peaks:
    """Activations above 0 with their place, packed so that they sort fast. Arrays of shape (N,)."""

    feature: NDArray[np.int64]
    place: NDArray[np.uint64]  # segment << 32 | ctx
    key: NDArray[np.uint64]  # bits of the float32 value << 32 | ~pos: larger is better

    @classmethod
    def pack(
        cls,
        feature: NDArray[np.int64],
        segment: int,
        ctx: NDArray[np.uint32],
        pos: NDArray[np.uint32],
        value: NDArray[np.float32],
    ) -> Peaks:
        """Peaks of one segment. The bits of a positive float32 order like its value."""
        place = np.uint64(segment) << _32 | ctx.astype(np.uint64)
        bits = value.view(np.uint32).astype(np.uint64)
        return cls(feature, place, bits << _32 | (_LOW - pos.astype(np.uint64)))

    segment = property(lambda self: (self.place >> _32).astype(np.int64))
    ctx = property(lambda self: (self.place & _LOW).astype(np.int64))
    pos = property(lambda self: (_LOW - (self.key & _LOW)).astype(np.int64))
    value = property(lambda self: (self.key >> _32).astype(np.uint32).view(np.float32))

    def __len__(self) -> int:
        return len(self.feature)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Peaks:
        return Peaks(self.feature[rows], self.place[rows], self.key[rows])

    def of(self, feature: int) -> Peaks:
        """The peaks of one latent; needs peaks sorted by latent, as `best` returns them."""
        return self.take(slice(*np.searchsorted(self.feature, [feature, feature + 1])))

    def one_per_context(self) -> Peaks:
        """The best peak of each (latent, context)."""
        rows = self.take(np.lexsort((~self.key, self.place, self.feature)))
        new = np.ones(len(rows), dtype=bool)
        new[1:] = (np.diff(rows.feature) != 0) | (rows.place[1:] != rows.place[:-1])
        return rows.take(new)

    def best(self, k: int) -> Peaks:
        """The k best of each latent, sorted by (latent, falling value, segment, ctx)."""
        rows = self.take(np.lexsort((self.place, ~(self.key >> _32), self.feature)))
        first = np.searchsorted(rows.feature, rows.feature)
        return rows.take(np.arange(len(rows)) - first < k)


def concat(parts: Sequence[Peaks]) -> Peaks:
    """All peaks of `parts`."""
    if not parts:
        return Peaks(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    columns = ([getattr(p, name) for p in parts] for name in ("feature", "place", "key"))
    return Peaks(*(np.concatenate(c) for c in columns))


class FeatureState:
    """Counts, sums and best contexts of every latent over the rows seen so far."""

    def __init__(self, n_latents: int, top_contexts: int) -> None:
        self.n_latents, self.top_contexts = n_latents, top_contexts
        self.n_tokens, self._n_contexts = 0, 0
        self.fires_F = np.zeros(n_latents, dtype=np.int64)
        self.sum_F = np.zeros(n_latents, dtype=np.float64)
        self._contexts_F = np.zeros(n_latents, dtype=np.int64)
        self._best = concat([])
        self._closed: set[int] = set()
        self._open: int | None = None
        self._pending: list[Peaks] = []
        self._seen: list[NDArray[np.uint32]] = []  # contexts of the open segment

    def update(self, segment: int, tokens: TokenTable, codes: Codes) -> None:
        """Add rows of a segment: their tokens and codes (B, F). Finish one segment at a time.

        Raises ValueError for a segment that was finished before, TrainingError on a code that is
        not finite.
        """
        if segment in self._closed:
            raise ValueError(f"segment {segment} was already counted")
        if segment != self._open:
            self._close()
            self._open = segment
        row, feature, value = _nonzeros(codes)
        self.n_tokens += len(tokens)
        self.fires_F += np.bincount(feature, minlength=self.n_latents)
        self.sum_F += np.bincount(feature, value, self.n_latents)
        self._seen.append(np.unique(tokens.ctx))
        peaks = Peaks.pack(feature, segment, tokens.ctx[row], tokens.pos[row], value)
        self._pending.append(peaks)
        if sum(map(len, self._pending)) > _PENDING:
            self._pending = [concat(self._pending).one_per_context()]

    def merge(self, other: FeatureState) -> None:
        """Add what `other` saw. ValueError if both saw the same segment, or differ in size."""
        if (self.n_latents, self.top_contexts) != (other.n_latents, other.top_contexts):
            raise ValueError("cannot merge states of different numbers of latents or contexts")
        self._close()
        other._close()
        if self._closed & other._closed:
            raise ValueError(f"both states counted segments {sorted(self._closed & other._closed)}")
        self.n_tokens += other.n_tokens
        self._n_contexts += other._n_contexts
        self.fires_F += other.fires_F
        self.sum_F += other.sum_F
        self._contexts_F += other._contexts_F
        self._closed |= other._closed
        self._best = concat([self._best, other._best]).best(self.top_contexts)

    def best(self) -> Peaks:
        """At most K peaks per latent, sorted by (latent, falling value, segment, ctx)."""
        self._close()
        return self._best

    @property
    def n_contexts(self) -> int:
        """Contexts with at least one row."""
        self._close()
        return self._n_contexts

    @property
    def contexts_F(self) -> NDArray[np.int64]:
        """In how many contexts each latent fires."""
        self._close()
        return self._contexts_F

    @property
    def max_F(self) -> NDArray[np.float32]:
        """Largest activation of each latent; 0 where it never fired."""
        best = self.best()
        out = np.zeros(self.n_latents, dtype=np.float32)
        out[best.feature[::-1]] = best.value[::-1]  # the first peak of a latent is written last
        return out

    def _close(self) -> None:
        """Count the open segment's contexts and keep its best peaks."""
        if self._open is None:
            return
        peaks = concat(self._pending).one_per_context()
        self._contexts_F += np.bincount(peaks.feature, minlength=self.n_latents)
        self._n_contexts += len(np.unique(np.concatenate(self._seen)))
        self._closed.add(self._open)
        self._best = concat([self._best, self._promising(peaks)]).best(self.top_contexts)
        self._open, self._pending, self._seen = None, [], []

    def _promising(self, peaks: Peaks) -> Peaks:
        """Peaks that may rank: not below the K-th of their latent, where it has K already."""
        last = np.searchsorted(self._best.feature, np.arange(self.n_latents), side="right") - 1
        full = np.bincount(self._best.feature, minlength=self.n_latents) == self.top_contexts
        floor_F = np.zeros(self.n_latents, dtype=np.uint64)
        floor_F[full] = self._best.key[last[full]] >> _32
        return peaks.take(peaks.key >> _32 >= floor_F[peaks.feature])


def _nonzeros(codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(row, latent, value) of every activation above 0 in codes (B, F)."""
    values = codes.values if isinstance(codes, SparseCodes) else codes
    if not bool(values.isfinite().all()):
        raise TrainingError("the SAE's activations are not finite: NaN or infinity in its codes")
    where = (values > 0).nonzero(as_tuple=True)
    feature = codes.indices[where] if isinstance(codes, SparseCodes) else where[1]
    value = values[where].float().cpu().numpy()
    return where[0].cpu().numpy(), feature.cpu().numpy(), value
