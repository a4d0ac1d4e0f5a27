"""Objects at a server, through obstore: bounded reads, byte ranges, retries. The web, read only.

Every request is tried up to `TRIES` times with growing pauses: after a 5xx or 429, a connection
that breaks or stands still for `STALL` seconds, a body that ends early. What cannot be mended by
waiting (no such object, no permission, a malformed request) is raised at once. Bytes that arrive
whole but wrong are found by the digests and checksums of the store and asked for again, see
`places.insist`.

obstore's threads do not live on in a forked process, which would wait for ever: refused in words.
"""

from __future__ import annotations

import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from actcache.store.errors import DamagedError, ObjectMissingError, RemoteError, StoreError

T = TypeVar("T")
Buffer = bytes | memoryview
TRIES = 5
PAUSE = 0.2  # seconds before the second try; doubled before each further one
STALL = 30.0  # seconds without a byte after which a connection is given up
BLOCK = 8 << 20  # bytes of one request of a whole object
AHEAD = 2  # such requests at once
_LASTING = {408, 425, 429}  # of the 4xx, those that waiting may mend
_pid: int | None = None  # process that runs obstore's threads


class Objects(ABC):
    """Reads objects below one address; `key` is the path there. Thread-safe."""

    listable = False

    def __init__(self, base: str) -> None:
        self.base = base

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"

    def name(self, key: str) -> str:
        """What the user would type."""
        return f"{self.base}/{key}".rstrip("/")

    # -- reading -----------------------------------------------------------------------------------

    def read(self, key: str, limit: int, exact: bool = False) -> bytes:
        """A whole object of at most `limit` bytes, or `exact`ly that many.

        Raises ObjectMissingError, DamagedError for another size, RemoteError.
        """

        def act(store: Any) -> bytes:
            found = _obstore().get(store, key)
            size = int(found.meta["size"])
            if size > limit or (exact and size != limit):
                expected = f"expected {limit:,}" if exact else "more than any store needs"
                raise DamagedError(f"{self.name(key)} has {size:,} bytes, {expected}")
            data = bytes(found.bytes())
            if len(data) != size:
                raise DamagedError(f"{self.name(key)}: {len(data):,} of {size:,} bytes came")
            return data

        return self.ask(key, act)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Byte ranges (offset, length), in the order asked; near ones come in one request.

        Raises ObjectMissingError, DamagedError if the object ends before, RemoteError.
        """

        def act(store: Any) -> list[memoryview]:
            starts, lengths = [start for start, _ in ranges], [n for _, n in ranges]
            found = _obstore().get_ranges(store, key, starts=starts, lengths=lengths)
            views = [memoryview(part) for part in found]
            short = [i for i, (_, n) in enumerate(ranges) if len(views[i]) != n]
            if short:
                raise DamagedError(f"{self.name(key)} is short: no {ranges[short[0]]} in it")
            return views

        return self.ask(key, act) if ranges else []

    def blocks(self, key: str) -> Iterator[memoryview]:
        """A whole object in order; at most `AHEAD` blocks are in memory."""
        size = self.size(key)
        if size is None:
            raise ObjectMissingError(f"{self.name(key)} is missing")
        for first in range(0, size, BLOCK * AHEAD):
            starts = range(first, min(size, first + BLOCK * AHEAD), BLOCK)
            yield from self.read_ranges(key, [(s, min(BLOCK, size - s)) for s in starts])

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if there is none. RemoteError."""
        try:
            return int(self.ask(key, lambda store: _obstore().head(store, key))["size"])
        except ObjectMissingError:
            return None

    def create(self, key: str, data: Buffer) -> None:
        """Put an object under a name that is free. StoreError where nothing can be written."""
        raise self._read_only(key)

    def refuse_unwritable(self, key: str) -> None:
        """StoreError if nothing can be written below `key`, or only over what others wrote."""
        raise self._read_only(key)

    def _read_only(self, key: str) -> StoreError:
        return StoreError(
            f"{self.name(key)} cannot be written: http(s):// is for reading. Name a folder or "
            "s3://bucket/prefix to write to"
        )

    def replace(self, key: str, data: Buffer) -> None:
        """Put an object over one that may be there. Raises as `create`."""
        raise self._read_only(key)

    def swap(self, key: str, old: bytes, new: bytes) -> bool:
        """Replace an object that holds `old`; False if another was faster. Raises as `create`."""
        raise self._read_only(key)

    def remove(self, key: str) -> None:
        """Remove an object, and all that lies below `key` as a folder. Raises as `create`."""
        raise self._read_only(key)

    def described(self, key: str) -> list[tuple[int, float]]:
        """Size and time of change of an object and of all below it. Raises as `names`."""
        raise self._unlisted(key)

    def names(self, folder: str) -> list[str]:
        """Names right below a folder, sorted. StoreError where nothing can be listed."""
        raise self._unlisted(folder)

    def _unlisted(self, folder: str) -> StoreError:
        return StoreError(f"{self.name(folder)} cannot be listed: {self.base} is a web server")

    # -- asking ------------------------------------------------------------------------------------

    def ask(self, key: str, act: Callable[[Any], T], size: int = 0) -> T:
        """`act(store)`, tried again while that may help; `size` is what it sends, in bytes.

        Raises ObjectMissingError, RemoteError. FileExistsError if `act` says so.
        """
        failures = (_obstore().exceptions.BaseError, OSError)
        store = self._store(size)
        for attempt in range(TRIES):
            try:
                return act(store)
            except FileExistsError:
                raise
            except failures as e:
                self._refuse(key, e)
                if attempt + 1 == TRIES or not self.pause(attempt, e):
                    raise RemoteError(f"{self.name(key)}: {_reason(e)}{self.hint(e)}") from None
        raise AssertionError("unreachable")

    def pause(self, attempt: int, e: Exception) -> bool:
        """Wait before the next try; False if waiting cannot help."""
        status = _status(e)
        if isinstance(e, ObjectMissingError) or (
            status is not None and 400 <= status < 500 and status not in _LASTING
        ):
            return False
        time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.5))
        return True

    def _refuse(self, key: str, e: Exception) -> None:
        """Raise what no further try would change."""
        if isinstance(e, FileNotFoundError):
            raise ObjectMissingError(f"{self.name(key)} is missing") from None
        denied = _obstore().exceptions
        if isinstance(e, (denied.PermissionDeniedError, denied.UnauthenticatedError)):
            raise RemoteError(
                f"no permission for {self.name(key)}: {_reason(e)}{self.hint(e)}"
            ) from None

    def hint(self, e: Exception) -> str:
        """What the user may do about an error; begins with a separator."""
        return ". Is the address right, and the server up? The same command continues"

    # -- the client --------------------------------------------------------------------------------

    def _store(self, size: int = 0) -> Any:
        """An obstore client for requests that send `size` bytes."""
        global _pid
        if _pid not in (None, os.getpid()):
            raise StoreError(
                f"{self.base}: a forked process cannot use an object store that its parent has "
                "used; start processes with the method 'spawn'"
            )
        _pid = os.getpid()
        return self._reading

    @cached_property
    def _reading(self) -> Any:
        return self.connect({"timeout": "1h", "read_timeout": _duration(STALL)})

    @abstractmethod
    def connect(self, times: dict[str, str]) -> Any:
        """An obstore client with these timeouts; retries are ours."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.base,)


class Web(Objects):
    """Files of a web server that serves byte ranges. Nothing can be listed or written."""

    @classmethod
    def open(cls, url: str) -> tuple[Web, str]:
        """Client and key of an address. StoreError if it is not a plain one."""
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise StoreError(f"{parts.scheme}://…@{parts.hostname}: no credentials in an address")
        if not parts.hostname or parts.query or parts.fragment:
            raise StoreError(f"{url}: expected http(s)://host/path, without ? and #")
        return cls(f"{parts.scheme}://{parts.netloc}"), unquote(parts.path).strip("/")

    def connect(self, times: dict[str, str]) -> Any:
        options = {"allow_http": self.base.startswith("http:"), "connect_timeout": "10s", **times}
        return _obstore().store.HTTPStore(
            self.base, client_options=options, retry_config={"max_retries": 0}
        )


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise StoreError(
            "s3:// and http:// need obstore, which is not installed: pip install obstore"
        ) from None
    return obstore


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _status(e: Exception) -> int | None:
    found = re.search(r"status code: (\d{3})", str(e))
    return int(found[1]) if found else None


def _reason(e: Exception) -> str:
    """The error in a line: the server's own words if it sent some, never obstore's debug output."""
    text = str(e).split("\n\nDebug source")[0]
    code, said = re.search(r"<Code>([^<]*)", text), re.search(r"<Message>([^<]*)", text)
    if code:
        return f"{code[1]}: {said[1]}" if said else code[1]
    text = re.sub(r"^Generic \S+ error: ", "", text.split("\n")[0])
    return re.sub(r"^Error performing (\S+) (\S+) in \S+ - ", r"\1 \2: ", text)[:300]
