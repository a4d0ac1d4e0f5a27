"""Rows to their shuffled places: the one copy that shuffling costs.

Compiled from `scatter.c` at its first use, if there is a C compiler ($CC, or cc), into the user's
cache folder; otherwise numpy does the same at a third of the speed. SAETRAIN_COMPILE=0 wants numpy.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SWITCH = "SAETRAIN_COMPILE"
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-shared", "-fPIC")
_SECONDS = 60  # for the compiler

Rows = NDArray[Any]
Places = NDArray[np.int64]


def scatter(to: Rows, at: Places, rows: Rows, which: Places | None = None) -> None:
    """`to[at] = rows[which]`, or `to[at] = rows`, of two matrices with rows of the same bytes.

    Releases the GIL. Raises IndexError, with nothing written, for a number that is out of range.
    """
    call = compiled()
    if call is None:
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
    if n != len(at) or call(*where, n, size):
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


@cache
def compiled() -> Callable[..., int] | None:
    """`scatter_rows` of `scatter.c`; None if it is not wanted or cannot be had."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        found: Any = ctypes.CDLL(str(_library())).scatter_rows
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.argtypes = [pointer, number, pointer, pointer, number, pointer, number, number]
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]


def _library() -> Path:
    """The compiled file. OSError or SubprocessError if there is none and it cannot be made."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source = _SOURCE.read_bytes()
    about = [source, *map(str.encode, (*compiler, *_FLAGS, platform.system(), platform.machine()))]
    name = f"scatter-{hashlib.sha256(b'|'.join(about)).hexdigest()[:16]}.so"
    file = _folder() / name
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            made = Path(scratch) / name
            command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            made.replace(file)  # whole or not at all: other processes may be doing the same
    return file


def _folder() -> Path:
    """A folder of this user's own, kept between runs."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "saetrain"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
