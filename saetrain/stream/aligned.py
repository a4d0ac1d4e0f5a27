"""One segment of several stores, in the row order of the first: see `join`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.store import DamagedError, HookInfo, HookStats, Segment, TokenTable
from actcache.store.int8_reader import Int8Reader
from actcache.store.layout import TOKEN_COLUMNS
from actcache.store.shard import OpenShard, ShardReader

RowMap = NDArray[np.int32]  # (n,) row in another store of each row


@dataclass(frozen=True)
class JoinedSegment:
    """One segment of every store, in the row order of the first."""

    parts: dict[str, Segment]
    places: Callable[[str], RowMap] = field(repr=False)

    @property
    def lead(self) -> Segment:
        return next(iter(self.parts.values()))

    id = property(lambda self: self.lead.id)
    n_rows = property(lambda self: self.lead.n_rows)

    @cached_property
    def hooks(self) -> dict[str, HookInfo]:
        return {
            f"{label}:{name}": replace(info, name=f"{label}:{name}")
            for label, part in self.parts.items()
            for name, info in part.hooks.items()
        }

    def tokens(self) -> TokenTable:
        """The token table, checksums checked."""
        return self.lead.tokens()

    def column(self, name: str) -> NDArray[Any]:
        """One column of the token table (n_rows,), its checksum checked."""
        return self.lead.column(name)

    def norms(self, hook: str) -> NDArray[np.float32]:
        """Length of each row of a hook (n_rows,), in the order of this segment."""
        label, name = hook.split(":", 1)
        norms, place = self.parts[label].norms(name), self.row_map(hook)
        return norms if place is None else norms[place]

    def stats(self, hook: str, special: bool = False) -> HookStats:
        """Statistics of this segment's rows."""
        label, name = hook.split(":", 1)
        return self.parts[label].stats(name, special)

    def reordered(self, hook: str) -> bool:
        """Whether the hook's store holds these rows in another order than the first store."""
        part = self.parts[hook.split(":", 1)[0]]
        return part.commits[0].token_digest != self.lead.commits[0].token_digest

    def row_map(self, hook: str) -> RowMap | None:
        """(n_rows,) row in the hook's own store of each row; None: the same."""
        return self.places(hook.split(":", 1)[0]) if self.reordered(hook) else None

    def stored(self, hook: str) -> ShardReader:
        """Reader of the hook's rows in the order of its own store."""
        label, name = hook.split(":", 1)
        reader = self.parts[label].acts(name)
        inner = (reader.codes, reader.scales) if isinstance(reader, Int8Reader) else ()
        for r in (reader, *inner):
            r.what = f"store {label}, {r.what}"  # in errors
        return reader

    def acts(self, hook: str) -> ShardReader:
        """Reader of the hook's rows in the order of this segment."""
        place = self.row_map(hook)
        return self.stored(hook) if place is None else Reordered(self.stored(hook), place)

    def check(self) -> None:
        """DamagedError unless all stores hold the same tokens here."""
        for label, part in self.parts.items():
            if part.commits[0].token_digest != self.lead.commits[0].token_digest:
                self.places(label)


class Reordered(ShardReader):
    """Rows of another reader in another order. A chunk may need all chunks of the other."""

    def __init__(self, reader: ShardReader, place: RowMap) -> None:
        """Row i is row `place[i]` of `reader`."""
        super().__init__(reader.root, reader.path, reader.info, reader.n_rows, reader.what)
        self.dtype, self._of, self._place = reader.dtype, reader, place

    def read_chunk(self, chunk: int) -> NDArray[Any]:
        """Rows (rows_in(chunk), d), in the type of the other reader. Raises DamagedError."""
        first = chunk * self.chunk_rows
        return self._rows(self._place[first : first + self.chunk_rows])

    def read_chunks(self, chunks: Sequence[int]) -> list[NDArray[Any]]:
        """As `read_chunk`, one after the other."""
        return [self.read_chunk(c) for c in chunks]

    def read_into(
        self, chunk: int, buffer: NDArray[np.uint8], file: OpenShard | None = None
    ) -> NDArray[Any]:
        """As `read_chunk`; `buffer` and `file` are not used."""
        return self.read_chunk(chunk)

    def read(self) -> NDArray[Any]:
        """All rows (n_rows, d)."""
        return self._rows(self._place)

    def _rows(self, rows: RowMap) -> NDArray[Any]:
        found = np.empty((len(rows), self.d), dtype=self.dtype)
        chunk = rows // self.chunk_rows
        for c in np.unique(chunk).tolist():
            at = np.flatnonzero(chunk == c)
            found[at] = self._of.read_chunk(c)[rows[at] - c * self.chunk_rows]
        return found


def row_places(parts: Mapping[str, Segment], label: str) -> RowMap:
    """Where each row of the first store's segment is in that of store `label`."""
    (a, first), b = next(iter(parts.items())), parts[label]
    mine, theirs = first.tokens(), b.tokens()
    here, there = np.lexsort((mine.pos, mine.ctx)), np.lexsort((theirs.pos, theirs.ctx))
    for name in TOKEN_COLUMNS:
        x, y = getattr(mine, name)[here], getattr(theirs, name)[there]
        if not np.array_equal(x, y):
            i = int(np.flatnonzero(x != y)[0])
            raise DamagedError(
                f"segment {first.id}: {a} and {label} have the same token_stream_id but other "
                f"tokens. In context {mine.ctx[here[i]]}, position {mine.pos[here[i]]}, {name} is "
                f"{x[i]} in {a} and {y[i]} in {label}. One is damaged: run actcache verify on both"
            )
    place = np.empty(len(here), dtype=np.int32)
    place[here] = there
    return place


AnySegment = Segment | JoinedSegment


def stored(segment: AnySegment, hook: str) -> ShardReader:
    """Reader of a hook's rows in the order of its own store."""
    return segment.stored(hook) if isinstance(segment, JoinedSegment) else segment.acts(hook)


def row_map(segment: AnySegment, hook: str) -> RowMap | None:
    """(n,) row number for `stored` of each row of the segment; None: the same."""
    return segment.row_map(hook) if isinstance(segment, JoinedSegment) else None


def unit_rows(segment: AnySegment, hooks: Sequence[str], run_chunks: int) -> int:
    """Rows that are read together: a run of chunks, or the segment where orders differ."""
    if isinstance(segment, JoinedSegment) and any(segment.reordered(h) for h in hooks):
        return int(segment.n_rows)
    return run_chunks * max(segment.hooks[h].chunk_rows for h in hooks)
