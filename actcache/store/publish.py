"""Publish without overwriting: a name either has its final, durable bytes or does not exist.

temporary file -> fsync -> link to the final name (fails if it exists) -> fsync of the folder, of a
segment's folders once at its end; in an object store a put on the condition that the name is free.
`rename`, which zarr's own LocalStore uses, would let a slow second writer replace committed bytes.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from actcache.store.errors import OutOfSpaceError, StoreError
from actcache.store.places import Location, Remote

PARTIAL = ".partial"


def publish(path: Location, data: bytes | memoryview, unsynced: set[Path] | None = None) -> None:
    """Create `path` holding `data`.

    The name is durable then; with `unsynced`, once `sync_folders` was given the folder added there.
    Raises FileExistsError if the name is taken (its bytes are untouched), OutOfSpaceError if the
    disk is full, StoreError if the folder cannot be written, RemoteError if a server does not take
    it.
    """
    if isinstance(path, Remote):
        path.client.create(path.key, data)
        return
    with publishing(path, unsynced) as file:
        file.write(data)


@contextmanager
def publishing(path: Location, unsynced: set[Path] | None = None) -> Iterator[BinaryIO]:
    """Create `path` from what the body writes into the file it is given; `unsynced` as `publish`.

    If the body raises, nothing is published. At a server the whole object is in memory until then.
    Raises as `publish`.
    """
    if isinstance(path, Remote):
        held = BytesIO()
        yield held
        publish(path, held.getbuffer())
        return
    temporary = path.parent / f".{path.name[:80]}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if unsynced is None:
            sync_folder(path.parent)
        else:
            unsynced.add(path.parent)
    except FileExistsError:
        raise
    except OSError as e:
        raise _explain(e, path) from e


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folders(folders: set[Path], root: Path) -> None:
    """Make the names in `folders` durable, and those in all folders above them, up to `root`.

    Once for many files, which takes no longer than the folder of each after it. A file whose
    folder is durable may still be lost with a folder further up. Raises as `publish`.
    """
    above = {up for f in folders for up in f.parents if up == root or root in up.parents}
    for folder in sorted(folders | above, key=lambda path: -len(path.parts)):
        try:
            sync_folder(folder)
        except OSError as e:
            raise _explain(e, folder) from e


def _explain(e: OSError, path: Path) -> StoreError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpaceError(
            f"no space left while writing {path}. Everything committed before is intact; "
            "free some space and run the same command again to continue"
        )
    return StoreError(f"cannot write {path}: {e.strerror or e}")
