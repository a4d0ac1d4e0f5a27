"""Bytes that others wrote: opened, bounded and parsed so that nothing they hold can do harm.

A store may come from another team, so every file of it is untrusted input. No file is read that is
not a regular file inside the store, none is read before its size was compared with what is
expected, and JSON is free of whatever later code would stumble over: NaN and infinities, numbers
beyond 64 bits, repeated keys, text that is not UTF-8, deep nesting.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from actcache.store.errors import DamagedError
from actcache.store.places import Location, Remote

MAX_JSON_BYTES = 256 << 20
MAX_JSON_VALUES = 1 << 24  # a parsed value takes up to a hundred bytes: bounds the memory
MAX_JSON_DEPTH = 64


def inside(root: Location, path: Location) -> Location:
    """`path`, if it lies in `root` once all symbolic links are followed; else DamagedError.

    The store's own folder may be a link; links that stay inside it may be used. Elsewhere than in
    a folder there are no links.
    """
    if isinstance(path, Remote) or isinstance(root, Remote):
        return path
    real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if not real.is_relative_to(base):
        raise DamagedError(
            f"{path} leads out of the store, to {real}. Everything a store names must lie in its "
            "own folder: copy the files there instead of linking them"
        )
    return path


def names_in(root: Location, folder: str, pattern: re.Pattern[str]) -> Sequence[Location]:
    """Entries of a folder of the store whose whole name matches, sorted; none if there is none.

    Raises DamagedError if it leads outside or cannot be listed: unreadable is not empty.
    """
    path = inside(root, root / folder)
    if isinstance(path, Remote):
        return [path / name for name in path.names() if pattern.fullmatch(name)]
    try:
        return sorted(entry for entry in path.iterdir() if pattern.fullmatch(entry.name))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise DamagedError(f"{path} cannot be read: {e.strerror}") from e


def open_file(root: Location | None, path: Path) -> FileIO:
    """A regular file of the store at `root`, unbuffered; see `open_regular`."""
    return FileIO(open_regular(root, path))


def open_regular(root: Location | None, path: Path) -> int:
    """Descriptor of a regular file of the store at `root`. DamagedError or OSError.

    `root` is None for a path that was checked before.
    """
    if root is not None:
        inside(root, path)
    # Without O_NONBLOCK a named pipe would be waited for, for ever.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamagedError(f"{path} is not a file")
    return fd


def read_file(root: Location, path: Location, limit: int, exact: bool = False) -> bytes:
    """The bytes of a file, at most `limit` of them, or `exact`ly that many.

    Raises DamagedError, of an object at a server also RemoteError.
    """
    if isinstance(path, Remote):
        return path.client.read(path.key, limit, exact)
    try:
        with open_file(root, path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit or (exact and size != limit):
                expected = f"expected {limit:,}" if exact else "more than any store needs"
                raise DamagedError(f"{path} has {size:,} bytes, {expected}")
            return file.read()
    except OSError as e:
        raise DamagedError(f"{path} cannot be read: {e.strerror}") from e


def parse_json(data: bytes, path: object) -> Mapping[str, Any]:
    """A JSON object, or DamagedError naming `path`."""
    if len(data) > MAX_JSON_BYTES:
        raise DamagedError(f"{path}: {len(data):,} bytes of JSON is more than any store needs")
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise DamagedError(f"{path}: more than {MAX_JSON_VALUES:,} values of JSON")
    try:
        value = json.loads(
            data.decode(),
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError) as e:
        raise DamagedError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: expected a JSON object")
    _refuse_depth(value, path)
    return value


def _refuse_depth(value: dict[str, Any], path: object) -> None:
    layer: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        try:
            layer = [child for item in layer for child in _containers(item)]
        except UnicodeEncodeError:
            raise DamagedError(f"{path} is not valid JSON: half of a surrogate pair") from None
        if not layer:
            return
    raise DamagedError(f"{path}: JSON is nested more than {MAX_JSON_DEPTH} deep")


def _containers(item: dict[str, Any] | list[Any]) -> Iterator[Any]:
    """Mappings and lists in `item`. UnicodeEncodeError for text that UTF-8 cannot hold."""
    for part in (item, item.values()) if isinstance(item, dict) else (item,):
        for value in part:
            if isinstance(value, str) and not value.isascii():
                value.encode()
            elif isinstance(value, (dict, list)):
                yield value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError("a whole number has more than 64 bits")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not allowed")
