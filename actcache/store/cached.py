"""A store at a server, read through a local cache: the same store, its bulk fetched once.

Shards and token columns go through the cache block by block, each checked by its crc32c; records
(store.json, commits, snapshots) and calibrations are small and always come from the server, checked
by their digests, so the cache can never show another state than the store has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.store import layout
from actcache.store.errors import DamagedError
from actcache.store.int8_reader import Int8Reader
from actcache.store.local_cache import LocalCache, sound
from actcache.store.objects import Buffer
from actcache.store.places import Remote, each
from actcache.store.reader import Segment, Snapshot, Store, checked_table
from actcache.store.schema import SnapshotEntry
from actcache.store.shard import OpenShard, ShardReader


def through(store: Store, cache: LocalCache) -> Store:
    """`store`, read through `cache`. A store in a folder is given back as it is."""
    if not isinstance(store.path, Remote):
        return store
    return CachedStore(store.path, store.identity, cache=cache)


@dataclass(frozen=True)
class CachedStore(Store):
    """A store whose snapshots read through a cache."""

    cache: LocalCache = field(kw_only=True, compare=False)

    def snapshot(self, name: str | None = None) -> Snapshot:
        return CachedSnapshot(self, super().snapshot(name).record, cache=self.cache)


@dataclass(frozen=True)
class CachedSnapshot(Snapshot):
    """A snapshot whose segments read through a cache."""

    cache: LocalCache = field(kw_only=True, compare=False)

    def _segment(self, entry: SnapshotEntry, first: Segment | None = None) -> Segment:
        return CachedSegment(self.store.path, entry, first, cache=self.cache)


@dataclass(frozen=True)
class CachedSegment(Segment):
    """A segment whose token columns and activations are kept in the cache."""

    cache: LocalCache = field(kw_only=True, compare=False)

    @cached_property
    def _digests(self) -> dict[str, str]:
        """sha256 of every object, by key in the store."""
        return {o.key: o.sha256 for commit in self.commits for o in commit.objects}

    def _digest(self, key: str) -> str:
        found = self._digests.get(key)
        if found is None:
            raise DamagedError(f"segment {self.id}: no commit names the object {key}")
        return found

    def column(self, name: str) -> NDArray[Any]:
        dtype = layout.TOKEN_COLUMNS[name]
        digest = self._digest(f"{self.commits[0].folder}/tokens/{name}/c/0")
        block = np.empty(self.n_rows * dtype.itemsize + 4, dtype=np.uint8)
        if not self.cache.read(digest, 0, block):
            data = np.ascontiguousarray(super().column(name), dtype=dtype).view(np.uint8)
            block[:-4] = data
            crc = int(google_crc32c.value(data)).to_bytes(4, "little")
            block[-4:] = np.frombuffer(crc, dtype=np.uint8)
            self.cache.write(digest, 0, block)
        return block[:-4].view(dtype)

    def tokens(self) -> layout.TokenTable:
        columns = each(self.root, self.column, layout.TOKEN_COLUMNS)
        return checked_table(layout.TokenTable(*columns), self.n_rows, f"segment {self.id}")

    def acts(self, hook: str) -> ShardReader:
        reader = super().acts(hook)
        if not isinstance(reader, Int8Reader):
            return self._cached(reader)
        reader.codes, reader.scales = self._cached(reader.codes), self._cached(reader.scales)
        return reader

    def _cached(self, plain: ShardReader) -> ShardReader:
        assert isinstance(plain.path, Remote)
        assert isinstance(self.root, Remote)
        digest = self._digest(str(plain.path.relative_to(self.root)))
        return CachedShard(plain, self.cache, digest)


class CachedShard(ShardReader):
    """Rows of one shard at a server; chunks and index are looked for in the cache first."""

    def __init__(self, plain: ShardReader, cache: LocalCache, digest: str) -> None:
        super().__init__(plain.root, plain.path, plain.info, plain.n_rows, plain.what)
        self._plain, self._cache, self._digest = plain, cache, digest

    def _fill(
        self, chunks: range, buffer: NDArray[np.uint8], file: OpenShard | None
    ) -> list[NDArray[np.uint8]]:
        found = []
        for i, chunk in enumerate(chunks):
            offset, size = self.place(chunk)
            block = buffer[i * size : (i + 1) * size]
            if not self._cache.read(self._digest, offset, block):
                super()._fill(range(chunk, chunk + 1), block, file)
                self._cache.write(self._digest, offset, block)
            found.append(block)
        return found

    def _pread(self, offset: int, size: int, what: str) -> bytes:
        block = np.empty(size, dtype=np.uint8)
        if not self._cache.read(self._digest, offset, block):
            self._pread_into(offset, size, block, what)
            if sound(block):  # if not, the caller says so and asks again
                self._cache.write(self._digest, offset, block)
        return block.tobytes()

    def _pread_into(
        self,
        offset: int,
        size: int,
        buffer: NDArray[np.uint8],
        what: str,
        file: OpenShard | None = None,
    ) -> NDArray[np.uint8]:
        return self._plain._pread_into(offset, size, buffer, what, file)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return [self._pread(offset, size, self.what) for offset, size in ranges]
