"""What stores need of files beside reading and publishing, the same in a folder and at a server.

Claims need objects that change hands: `swap`, `touch` and a clock. In a folder a file changes hands
by renaming it aside, which one of two succeeds in; in an object store by a put on the condition
that the entity tag is still the one that was read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.store.errors import ObjectMissingError
from actcache.store.objects import Buffer
from actcache.store.places import Location, Remote
from actcache.store.publish import PARTIAL, publish
from actcache.store.untrusted import open_file

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """An object, or all of a folder."""

    bytes: int
    modified: float  # seconds, by the clock of `now`; of a folder the newest


def blocks(root: Location, path: Location) -> Iterator[Buffer]:
    """A whole object of the store at `root`, in order, in pieces of some MiB.

    Raises DamagedError or OSError, of a server's object RemoteError.
    """
    if isinstance(path, Remote):
        yield from path.client.blocks(path.key)
        return
    with open_file(root, path) as file:
        while block := file.read(_BLOCK):
            yield block


def file_size(root: Location, path: Location) -> int:
    """Bytes of an object of the store at `root`. Raises as `blocks`."""
    if isinstance(path, Remote):
        size = path.client.size(path.key)
        if size is None:
            raise ObjectMissingError(f"{path} is missing")
        return size
    with open_file(root, path) as file:
        return os.fstat(file.fileno()).st_size


def entry(path: Location) -> Entry | None:
    """Size and age of an object, or of all that a folder holds; None if it is missing."""
    if isinstance(path, Remote):
        return _remote_entry(path)
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    try:
        stats = [(p.is_file(), p.lstat()) for p in paths]
    except FileNotFoundError:
        return None  # removed this moment
    return Entry(
        sum(stat.st_size for is_file, stat in stats if is_file),
        max(stat.st_mtime for _, stat in stats),
    )


def _remote_entry(path: Remote) -> Entry | None:
    found = path.client.described(path.key)
    if not found:
        return None
    return Entry(sum(size for size, _ in found), max(modified for _, modified in found))


def remove(path: Location) -> None:
    """Remove an object, or a folder with all that is in it; nothing if there is none."""
    if isinstance(path, Remote):
        path.client.remove(path.key)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Location, data: Buffer) -> None:
    """Write whole or not at all, over what may be there. Never used within a store. OSError."""
    if isinstance(path, Remote):
        path.client.replace(path.key, data)
        return
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{PARTIAL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -- objects that change hands ---------------------------------------------------------------------


def swap(path: Location, old: bytes, new: bytes) -> bool:
    """Replace an object that holds `old` by one that holds `new`; False if another was faster."""
    if isinstance(path, Remote):
        return path.client.swap(path.key, old, new)
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    stolen = aside.read_bytes() != old  # another writer had just taken it over: give it back
    with contextlib.suppress(FileExistsError):
        if stolen:
            os.link(aside, path)
    aside.unlink()
    if stolen:
        return False
    try:
        publish(path, new)
    except FileExistsError:
        return False
    return True


def touch(path: Location, data: bytes) -> None:
    """Make the object that holds `data` as new as now; nothing if it is another's or gone."""
    if isinstance(path, Remote):
        path.client.swap(path.key, data, data)
        return
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)


def now(folder: Location) -> float:
    """The time by the clock that gives the objects in `folder` their age."""
    clock = folder / f".clock.{uuid.uuid4().hex[:8]}{PARTIAL}"
    if isinstance(clock, Path):
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.touch()
        os.utime(clock)
    else:
        clock.client.replace(clock.key, b"")
    try:
        found = entry(clock)
    finally:
        remove(clock)
    if found is None:
        raise FileNotFoundError(clock)
    return found.modified
