"""A bounded folder on this machine for bytes of stores at a server: each is fetched once.

Every block that a reader asks for (an inner chunk, a shard's index, a token column) ends in its own
crc32c. A file of the cache stands for one object of a store and is named by the object's sha256;
blocks lie in it at the offsets they have there, and what was not fetched yet is a hole. Whether a
block is there is not written down anywhere: it is if its checksum fits. So nothing needs a lock,
several processes may fill one folder, and whatever a crash leaves behind is fetched again.

Room: before the folder would grow beyond its size, the objects used longest ago are removed until a
tenth is free. Only files of `blocks/` are ever removed, copies all of them; a folder that holds
anything else is refused. A reader that has a file open keeps it, the next reads it from the server.

Cost: a checksum more for a block that is not there. Several processes may each exceed the size by
1/64 of it before they notice one another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.store.errors import OutOfSpaceError, StoreError
from actcache.store.publish import publish

MARK = "local-cache.txt"
_MARKED = b"Copies of parts of stores, fetched by actcache and saetrain. May be deleted.\n"
BLOCKS = "blocks"
TOUCH = 30.0  # seconds after which the use of a file is noted again
_PAGE = 8192  # what a block may take beside its bytes
_SHARES = 64  # the folder is looked at again after 1/64 of its size was written


@dataclass
class Traffic:
    """What a cache has done in this process."""

    hits: int = 0  # blocks read here
    fetched: int = 0  # blocks written after they came from the server
    fetched_bytes: int = 0
    evicted: int = 0  # objects removed


class LocalCache:
    """Blocks of objects in a folder of at most `max_bytes`. Threads and processes may share it."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """StoreError if `folder` is something else than a cache, or cannot be written."""
        self.folder, self.max_bytes = Path(folder).expanduser().absolute(), max_bytes
        if max_bytes < 1:
            raise StoreError(f"cache_dir={folder}: its size must be more than 0 bytes")
        self.traffic = Traffic()
        self._claim()
        self._guard = threading.Lock()
        self._room = 0  # bytes that may be written before the folder is looked at again
        self._touched: dict[str, float] = {}

    def _claim(self) -> None:
        """Mark the folder as a cache; refuse one that holds other things."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {p.name for p in self.folder.iterdir()}
        except OSError as e:
            raise StoreError(f"cache_dir={self.folder} cannot be used: {e.strerror}") from e
        strangers = {n for n in names if not n.startswith(".")} - {MARK, BLOCKS}
        if MARK not in names and (strangers or BLOCKS in names):
            raise StoreError(
                f"cache_dir={self.folder} holds other things ({min(strangers or names)!r}); what "
                "lies in a cache may be removed, so name a new or an empty folder"
            )
        if MARK not in names:
            with contextlib.suppress(FileExistsError):  # another process was faster
                publish(self.folder / MARK, _MARKED)

    # -- blocks ------------------------------------------------------------------------------------

    def read(self, digest: str, offset: int, block: NDArray[np.uint8]) -> bool:
        """Fill `block`, checksum included, with what the object has at `offset`, if that is here.

        `digest` is the object's sha256. False if the block is not here or is damaged.
        """
        path = self._path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError as e:
            raise StoreError(f"cache_dir: {path} cannot be read: {e.strerror}") from e
        try:
            found = os.preadv(fd, [block.data], offset) == len(block) and sound(block)
            if found:
                self._touch(digest, fd)
                self.traffic.hits += 1
            return found
        except OSError as e:
            raise StoreError(f"cache_dir: {path} cannot be read: {e.strerror}") from e
        finally:
            os.close(fd)

    def write(self, digest: str, offset: int, block: NDArray[np.uint8]) -> None:
        """Keep a block that was read and checked, if it fits at all.

        Raises OutOfSpaceError if the disk is full before the cache is, else StoreError.
        """
        size = len(block) + _PAGE
        if size > self.max_bytes:
            return
        with self._guard:
            if size > self._room:
                self._room = self._make_room(size)
            self._room -= size
        path = self._path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                os.pwrite(fd, block.data, offset)  # a short write fails its checksum later
            finally:
                os.close(fd)
        except OSError as e:
            raise self._explain(e) from e
        self.traffic.fetched += 1
        self.traffic.fetched_bytes += len(block)

    def _path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self.folder / BLOCKS / name[:2] / name

    def _touch(self, digest: str, fd: int) -> None:
        """Note that a file was used, now and then: eviction goes by this."""
        now = time.monotonic()
        if now - self._touched.get(digest, -TOUCH) >= TOUCH:
            self._touched[digest] = now
            os.utime(fd)

    def _explain(self, e: OSError) -> StoreError:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            held = sum(size for _, size, _ in self._files())
            return OutOfSpaceError(
                f"no space left for the local cache cache_dir={self.folder}: it holds "
                f"{held / 1e9:.3g} GB and may grow to {self.max_bytes / 1e9:.3g} GB. Set cache_gb "
                "to what the disk has, or name a folder on another disk"
            )
        return StoreError(f"cache_dir={self.folder} cannot be written: {e.strerror}")

    # -- room --------------------------------------------------------------------------------------

    def held_bytes(self) -> int:
        """Bytes that the cache takes on the disk."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes on the disk, path) of every object."""
        for folder in _entries(self.folder / BLOCKS):
            for entry in _entries(Path(folder.path)):
                with contextlib.suppress(FileNotFoundError):  # removed this moment
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime, found.st_blocks * 512, Path(entry.path)

    def _make_room(self, size: int) -> int:
        """Evict until `size` more bytes fit; how much may be written before the next look."""
        with self._alone():
            files = sorted(self._files())
            total = sum(bytes_ for _, bytes_, _ in files)
            if total + size > self.max_bytes:
                for _, bytes_, path in files:
                    if total <= max(0, self.max_bytes * 9 // 10 - size):
                        break
                    path.unlink(missing_ok=True)
                    total -= bytes_
                    self.traffic.evicted += 1
        return max(size, min(self.max_bytes - total, self.max_bytes // _SHARES))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process and one thread at a time; a dead one's lock is gone with it."""
        try:
            lock = (self.folder / ".lock").open("w")
        except OSError as e:
            raise self._explain(e) from e
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def sound(block: NDArray[np.uint8]) -> bool:
    """Whether the last four bytes are the crc32c (little-endian) of those before.

    Never true of a hole: the checksum of zeros is not zero for any size a block can have.
    """
    return bool(google_crc32c.value(block[:-4]) == int.from_bytes(block[-4:].tobytes(), "little"))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
