"""Read inner chunks of one shard with pread, every checksum checked.

zarr-python fills a missing inner chunk with zeros; here it raises. The layout is fixed (bytes +
crc32c, index at the end), so a chunk is one pread of a known size into a caller's buffer, or one
range of an object at a server; there many are asked for at once with `read_chunks`, `read_ranges`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.store.errors import DamagedError
from actcache.store.layout import DTYPES
from actcache.store.objects import Buffer
from actcache.store.places import Location, Remote, insist
from actcache.store.schema import HookInfo
from actcache.store.untrusted import open_regular

_CRC = 4
_PAGE = 4096  # of direct reads: offsets, sizes and memory are multiples
_ABSENT = np.uint64(0xFFFFFFFFFFFFFFFF)


def check_crc(data: bytes | memoryview, what: str) -> memoryview:
    """The payload of `data` = payload + little-endian crc32c of it. DamagedError if it differs."""
    view = memoryview(data)
    payload, stored = view[:-_CRC], int.from_bytes(view[-_CRC:], "little")
    _compare(google_crc32c.value(bytes(payload)), stored, what)
    return payload


def _compare(found: int, stored: int, what: str) -> None:
    if found != stored:
        raise DamagedError(
            f"{what}: checksum is {found:08x}, expected {stored:08x}. The bytes on disk are "
            "damaged; copy the store again, or delete the segment and rerun actcache"
        )


class OpenShard:
    """A shard's file, open as long as anybody refers to it; threads may share it."""

    def __init__(self, fd: int, direct: bool = False) -> None:
        """Owns `fd`. `direct`: read past the page cache, where the file system can."""
        self.fd, self.direct = fd, direct and _set_direct(fd, True)

    def __del__(self) -> None:
        os.close(self.fd)

    def read(self, offset: int, size: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`size` bytes from `offset` on, somewhere in `buffer`; fewer at the end. OSError."""
        if self.direct:
            try:
                return self._read_pages(offset, size, buffer)
            except OSError as e:
                if e.errno != errno.EINVAL or not _set_direct(self.fd, False):
                    raise
                self.direct = False  # it wants larger pages than ours
        return buffer[: os.preadv(self.fd, [buffer[:size].data], offset)]

    def _read_pages(self, offset: int, size: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        skip = offset % _PAGE
        span = -(-(skip + size) // _PAGE) * _PAGE
        found = os.preadv(self.fd, [buffer[:span].data], offset - skip)
        return buffer[skip : min(found, skip + size)]


def scratch(size: int) -> NDArray[np.uint8]:
    """Memory for `ShardReader.read_into` of chunks of `size` bytes."""
    memory = np.empty(size + 4 * _PAGE, dtype=np.uint8)
    first = -memory.ctypes.data % _PAGE
    return memory[first : first + size + 3 * _PAGE]


def _set_direct(fd: int, on: bool) -> bool:
    """Whether the file is read directly, or not, from now on as wanted."""
    flag: int = getattr(os, "O_DIRECT", 0)
    if not flag:
        return not on
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
    except OSError:
        return False
    return True


class ShardReader:
    """Rows of one hook of one segment: shape (n_rows, d)."""

    def __init__(
        self, root: Location, path: Location, info: HookInfo, n_rows: int, what: str
    ) -> None:
        """`root` is the store's; `what` names segment and hook in errors. Nothing is read yet.

        `path` is the shard: a file, or an object at a server.
        """
        self.root, self.path, self.info, self.n_rows, self.what = root, path, info, n_rows, what
        self.dtype = DTYPES[info.dtype]
        self.d, self.chunk_rows = info.d, info.chunk_rows
        self.n_chunks = -(-n_rows // info.chunk_rows)
        self.chunk_bytes = info.chunk_bytes
        self._offsets: NDArray[np.uint64] | None = None
        self._inside = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_rows, self.d

    @property
    def shard_bytes(self) -> int:
        """Size of the whole file."""
        return self.info.shard_bytes(self.n_rows)

    def rows_in(self, chunk: int) -> int:
        """Rows of inner chunk `chunk`; the last one may be short."""
        return min(self.chunk_rows, self.n_rows - chunk * self.chunk_rows)

    def read_chunk(self, chunk: int) -> NDArray[Any]:
        """Rows (rows_in(chunk), d) of one inner chunk, in the storage type.

        Raises DamagedError, naming segment, hook and chunk, if a byte is missing or wrong.
        """
        what = f"{self.what}, chunk {chunk}"
        return insist(self.path, lambda: self._check(chunk, self._pread(*self.place(chunk), what)))

    def read_chunks(self, chunks: Sequence[int]) -> list[NDArray[Any]]:
        """Many chunks as `read_chunk`, asked for at once: at a server that saves round trips."""
        found = self.read_ranges([self.place(chunk) for chunk in chunks])
        return [self._checked(c, part) for c, part in zip(chunks, found, strict=True)]

    def place(self, chunk: int) -> tuple[int, int]:
        """(offset, length) of an inner chunk in the file, its crc32c included."""
        return int(self._index()[chunk]), self.chunk_bytes + _CRC

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes (offset, length) of the file, unchecked; near ones are read together at a server.

        Threads may call this at the same time. Raises DamagedError, RemoteError.
        """
        if not isinstance(self.path, Remote):
            return [self._pread(*r, self.what) for r in ranges]
        try:
            return list(self.path.read_ranges(ranges))
        except DamagedError as e:
            raise DamagedError(f"{self.what}: {e}") from e

    def _check(self, chunk: int, data: Buffer) -> NDArray[Any]:
        rows = np.frombuffer(check_crc(data, f"{self.what}, chunk {chunk}"), dtype=self.dtype)
        return rows.reshape(self.chunk_rows, self.d)[: self.rows_in(chunk)]

    def _checked(self, chunk: int, data: Buffer) -> NDArray[Any]:
        """The rows in `data`; read anew if they were damaged on their way from a server."""
        try:
            return self._check(chunk, data)
        except DamagedError:
            if isinstance(self.path, Remote):
                return self.read_chunk(chunk)
            raise

    def open(self, direct: bool = False) -> OpenShard | None:
        """The file, for many calls of `read_into`; None if the shard is no file.

        `direct` reads past the page cache where the file system can: faster for a store that the
        memory cannot hold, slower for one that it can. Raises DamagedError if the file is missing
        or has another size than the store says.
        """
        return None if isinstance(self.path, Remote) else self._open(self.what, direct)

    def read_into(
        self, chunk: int, buffer: NDArray[np.uint8], file: OpenShard | None = None
    ) -> NDArray[Any]:
        """Like `read_chunk`, without allocating: the rows are a view of `buffer`.

        `buffer` comes from `scratch(chunk_bytes)` and is overwritten. Threads may call this
        at the same time with buffers of their own. `file` saves opening it.
        """
        return self.read_run(range(chunk, chunk + 1), buffer, file)[0]

    def read_run(
        self, chunks: range, buffer: NDArray[np.uint8], file: OpenShard | None = None
    ) -> list[NDArray[Any]]:
        """`read_into` of neighbouring chunks: one read, if they lie side by side in the file.

        `buffer` comes from `scratch(len(chunks) * (chunk_bytes + 4))`.
        """
        blocks = insist(self.path, lambda: self._fill(chunks, buffer, file))
        shape = (self.chunk_rows, self.d)
        rows = (block[: self.chunk_bytes].view(self.dtype).reshape(shape) for block in blocks)
        return [x[: self.rows_in(c)] for c, x in zip(chunks, rows, strict=True)]

    def _fill(
        self, chunks: range, buffer: NDArray[np.uint8], file: OpenShard | None
    ) -> list[NDArray[np.uint8]]:
        """The parts of `buffer` that have the bytes and checksums of the chunks now."""
        first, size = self.place(chunks[0])
        what = f"{self.what}, chunk {chunks[0]}"
        places = [self.place(c)[0] for c in chunks]
        if places != [first + i * size for i in range(len(chunks))]:
            parts = [buffer[i * size :] for i in range(len(chunks))]
            each = zip(chunks, parts, strict=True)
            return [b for c, part in each for b in self._fill(range(c, c + 1), part, None)]
        found = self._pread_into(first, len(chunks) * size, buffer, what, file)
        blocks = [found[i * size : (i + 1) * size] for i in range(len(chunks))]
        for c, block in zip(chunks, blocks, strict=True):
            stored = int.from_bytes(block[self.chunk_bytes :].tobytes(), "little")
            crc = google_crc32c.value(block[: self.chunk_bytes])
            _compare(crc, stored, f"{self.what}, chunk {c}")
        return blocks

    def read(self) -> NDArray[Any]:
        """All rows (n_rows, d)."""
        return np.concatenate([self.read_chunk(i) for i in range(self.n_chunks)])

    def _index(self) -> NDArray[np.uint64]:
        if self._offsets is None:
            self._offsets = insist(self.path, self._read_index)
        return self._offsets

    def _read_index(self) -> NDArray[np.uint64]:
        what = f"{self.what}, shard index"
        size = self.n_chunks * 16 + _CRC
        raw = check_crc(self._pread(self.shard_bytes - size, size, what), what)
        index = np.frombuffer(raw, dtype="<u8").reshape(self.n_chunks, 2)
        lost = np.flatnonzero((index == _ABSENT).any(axis=1))
        if len(lost):
            raise DamagedError(f"{self.what}: inner chunk {lost[0]} was never written")
        length = self.chunk_bytes + _CRC
        # Side by side in any order: no chunk stands for two, none lies elsewhere.
        places = np.arange(self.n_chunks, dtype=np.uint64) * np.uint64(length)
        if (index[:, 1] != length).any() or (np.sort(index[:, 0]) != places).any():
            raise DamagedError(f"{what}: entries do not fit the array's shape")
        return index[:, 0].copy()

    def _pread(self, offset: int, size: int, what: str) -> bytes:
        buffer = np.empty(size, dtype=np.uint8)
        return self._pread_into(offset, size, buffer, what).tobytes()

    def _pread_into(
        self,
        offset: int,
        size: int,
        buffer: NDArray[np.uint8],
        what: str,
        file: OpenShard | None = None,
    ) -> NDArray[np.uint8]:
        """The bytes, in `buffer`. DamagedError if there are fewer."""
        if isinstance(self.path, Remote):
            (data,) = self.read_ranges([(offset, size)])
            buffer[:size] = np.frombuffer(data, dtype=np.uint8)
            return buffer[:size]
        try:
            found = (file or self._open(what)).read(offset, size, buffer)
        except OSError as e:
            raise DamagedError(f"{what}: {self.path} cannot be read: {e.strerror}") from e
        if len(found) != size:
            raise DamagedError(f"{what}: short read of {self.path} at {offset}")
        return found

    def _open(self, what: str, direct: bool = False) -> OpenShard:
        assert not isinstance(self.path, Remote)
        try:
            file = OpenShard(open_regular(None if self._inside else self.root, self.path), direct)
            found = os.fstat(file.fd).st_size
        except FileNotFoundError:
            raise DamagedError(f"{what}: {self.path} is missing") from None
        except OSError as e:
            raise DamagedError(f"{what}: {self.path} cannot be read: {e.strerror}") from e
        self._inside = True  # links are followed once, not for every chunk
        if found != self.shard_bytes:
            raise DamagedError(
                f"{what}: {self.path} has {found:,} bytes, expected {self.shard_bytes:,}"
            )
        return file
