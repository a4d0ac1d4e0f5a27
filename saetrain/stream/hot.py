"""The stream's hot path, compiled: chunks read, checked, and their rows copied to shuffled places.

`hot.c` is compiled at its first use, see `saetrain.native`; without a compiler Python and numpy do
the same, slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from saetrain.native import build

Rows = NDArray[Any]
Places = NDArray[np.int64]


def scatter(to: Rows, at: Places, rows: Rows, which: Places | None = None) -> None:
    """`to[at] = rows[which]`, or `to[at] = rows`, of two matrices with rows of the same bytes.

    Releases the GIL. Raises IndexError, with nothing written, for a number that is out of range.
    """
    library = compiled()
    if library is None:
        _by_numpy(to, at, rows, which)
        return
    size = rows.shape[1] * rows.itemsize
    if to.shape[1] * to.itemsize != size or not (to.flags.c_contiguous and rows.flags.c_contiguous):
        raise ValueError(f"cannot copy rows {rows.shape} {rows.dtype} to {to.shape} {to.dtype}")
    at = np.ascontiguousarray(at)
    if which is not None:
        which = np.ascontiguousarray(which)
    n = len(at) if which is None else min(len(at), len(which))
    chosen = None if which is None else which.ctypes.data
    where = (to.ctypes.data, len(to), at.ctypes.data, rows.ctypes.data, len(rows), chosen)
    if n != len(at) or library.scatter_rows(*where, n, size):
        raise IndexError(f"row numbers do not fit {len(rows)} rows copied into {len(to)}")


def _by_numpy(to: Rows, at: Places, rows: Rows, which: Places | None) -> None:
    to, rows = _wide(to), _wide(rows)
    if not _within(at, len(to)) or (which is not None and not _within(which, len(rows))):
        raise IndexError(f"row numbers do not fit {len(rows)} rows copied into {len(to)}")
    to[at] = rows if which is None else rows[which]


def _within(numbers: Places, n: int) -> bool:
    return len(numbers) == 0 or 0 <= int(numbers.min()) <= int(numbers.max()) < n


def _wide(rows: Rows) -> Rows:
    """The same memory in the widest words that a row consists of: numpy copies them faster."""
    row_bytes = rows.shape[1] * rows.itemsize
    word = next(w for w in (8, 4, 2, 1) if row_bytes % w == 0)
    return rows.view(np.uint8).reshape(len(rows), row_bytes).view(f"u{word}")


class Opened(Protocol):
    """A file that stays open as long as it is referred to."""

    fd: int


@dataclass(frozen=True)
class Chunk:
    """A chunk of a file, for `fill`: its rows `which` (None: all) go to the places `at`."""

    file: Opened
    offset: int
    at: Places
    which: Places | None


def fill(to: Rows, chunks: Sequence[Chunk], n_rows: int, scratch: NDArray[np.uint8]) -> int:
    """Rows of the chunks to their places; how many chunks were done, 0 without a compiler.

    A chunk has `n_rows` rows as wide as those of `to`, then its crc32c; `scratch` has room for one.
    It stops at a chunk that is cut, damaged or asked for wrongly, which is for others to say.
    Releases the GIL.
    """
    library = compiled()
    if library is None or not to.flags.c_contiguous:
        return 0
    size = to.shape[1] * to.itemsize
    if len(scratch) < n_rows * size + 4:
        raise ValueError(f"scratch has {len(scratch)} bytes, a chunk {n_rows * size + 4}")
    jobs = np.array([_job(c) for c in chunks], dtype=np.int64)
    place = (n_rows, size, to.ctypes.data, len(to))
    return int(library.fill_rows(jobs.ctypes.data, len(jobs), scratch.ctypes.data, *place))


def _job(chunk: Chunk) -> tuple[int, ...]:
    """The fields of `struct job`."""
    n = len(chunk.at)
    return chunk.file.fd, chunk.offset, n, _address(chunk.at, n), _address(chunk.which, n)


def _address(numbers: Places | None, n: int) -> int:
    """Of `n` row numbers; 0 for None."""
    if numbers is None:
        return 0
    if numbers.dtype != np.int64 or not numbers.flags.c_contiguous or len(numbers) != n:
        raise ValueError(f"expected {n} row numbers side by side, int64, got {len(numbers)}")
    return int(numbers.ctypes.data)


@cache
def compiled() -> Any:
    """The library made of `hot.c`; None if it is not wanted or cannot be had."""
    library = build(Path(__file__).with_name("hot.c"))
    if library is not None:
        _declare(library)
    return library


def _declare(library: Any) -> None:
    p, n = ctypes.c_void_p, ctypes.c_int64
    library.scatter_rows.argtypes = [p, n, p, p, n, p, n, n]
    library.scatter_rows.restype = ctypes.c_int
    library.fill_rows.argtypes = [p, n, p, n, n, p, n]
    library.fill_rows.restype = n
    library.checksum.argtypes = [p, n, p]
    library.checksum.restype = ctypes.c_int
