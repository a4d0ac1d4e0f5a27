"""Where a store lies: a local folder, a prefix of an object store, or an address on the web.

A location is a `Path`, or a `Remote`, which is joined and named like one. Code that reads and
writes stores goes through a few functions that take both (`untrusted.read_file`, `publish.publish`,
those of `files`) and so need not know which it has.

    s3://bucket/prefix     any S3-compatible object store, s3.py
    http://… https://…     reading only, objects.py
    anything else          a folder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import total_ordering
from pathlib import Path, PurePosixPath
from typing import TypeVar

from actcache.store.errors import DamagedError, StoreError
from actcache.store.objects import TRIES, Objects, Web

T = TypeVar("T")
S = TypeVar("S")
IN_FLIGHT = 16  # requests at once where they hide round trips
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@total_ordering
@dataclass(frozen=True, eq=False)
class Remote:
    """An object, or what all keys of a folder begin with, at a server. Joined like a Path."""

    client: Objects
    key: str

    def __str__(self) -> str:
        return self.client.name(self.key)

    def __truediv__(self, part: str | PurePosixPath) -> Remote:
        return Remote(self.client, f"{self.key}/{part}".strip("/"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: Remote) -> bool:
        return str(self) < str(other)

    def __fspath__(self) -> str:
        raise StoreError(f"{self} is not a file on this machine: actcache cp brings a store here")

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> Remote:
        return Remote(self.client, self.key.rpartition("/")[0])

    def relative_to(self, other: Remote) -> PurePosixPath:
        """As of paths. ValueError if it does not lie below `other`."""
        return PurePosixPath(self.key).relative_to(other.key)

    def names(self) -> list[str]:
        """Names right below, sorted. StoreError where nothing can be listed."""
        return self.client.names(self.key)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Byte ranges (offset, length) of the object, many at once; threads may.

        Raises ObjectMissingError, DamagedError if the object ends before, RemoteError.
        """
        return self.client.read_ranges(self.key, ranges)

    def is_file(self) -> bool:
        """Whether the object is there. RemoteError if that cannot be told."""
        return self.client.size(self.key) is not None

    exists = is_file


Location = Path | Remote


def place(where: str | Path | Remote) -> Location:
    """The location that a path or URL names. StoreError for a URL that cannot be one."""
    if not isinstance(where, str):
        return where.expanduser() if isinstance(where, Path) else where
    scheme = _SCHEME.match(where)
    if scheme is None:
        return Path(where).expanduser()
    kind = scheme[1].lower()
    if kind == "s3":
        from actcache.store.s3 import open_bucket

        return Remote(*open_bucket(where))
    if kind in ("http", "https"):
        return Remote(*Web.open(where))
    raise StoreError(
        f"{where}: {kind}:// is not supported; expected a folder, s3://bucket/prefix, or "
        "http(s)://… for reading"
    )


def listable(location: Location) -> bool:
    """Whether the names in a folder can be listed; a web server only serves names it is told."""
    return isinstance(location, Path) or location.client.listable


def refuse_unwritable(location: Location) -> None:
    """StoreError where nothing can be written, or not without replacing what others wrote."""
    if isinstance(location, Remote):
        location.client.refuse_unwritable(location.key)


def address(location: Location) -> str:
    """Absolute path or URL: equal for equal locations."""
    return str(location if isinstance(location, Remote) else location.resolve())


def relative(root: Location, path: Location) -> str:
    """The key of `path` in the store at `root`, with '/' between parts."""
    if isinstance(path, Remote) and isinstance(root, Remote):
        return str(path.relative_to(root))
    return Path(path).relative_to(Path(root)).as_posix()


def insist(location: Location, act: Callable[[], T]) -> T:
    """The result of `act`, which reads and checks; again if bytes may be damaged on their way."""
    if isinstance(location, Remote):
        for attempt in range(TRIES - 1):
            try:
                return act()
            except DamagedError as e:
                if not location.client.pause(attempt, e):
                    raise
    return act()


def each(location: Location, act: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """`act` of every item, in order; several at once where that hides round trips."""
    todo = list(items)
    if isinstance(location, Path) or len(todo) < 2:
        return [act(item) for item in todo]
    with ThreadPoolExecutor(IN_FLIGHT, "objects") as pool:
        return list(pool.map(act, todo))
