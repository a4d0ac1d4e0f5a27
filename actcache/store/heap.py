"""Memory that a pass over a batch gives back is kept for the next one, in both stages.

The C library returns freed blocks of a few MB to the system at once, and the system hands them out
again page by page, each page cleared and mapped at its first touch: 2,800 pages for every 1,024
tokens of a small host on a CPU, a seventh of its processor time (d = 256, batches of 2,048 tokens);
2,600 pages for a training step of 4,096 latents, an eighth. Tensors of all passes have the same
sizes, so what is kept fits the next pass exactly.

Cost: up to KEEP bytes stay with the process between passes; its peak is that of one pass as before.
glibc only; elsewhere, and where the environment tunes malloc itself, nothing changes.
Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

KEEP = 1 << 29  # bytes that may lie free at the end of the heap
LARGEST = 1 << 25  # larger blocks still come from the system; older versions of glibc take no more
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_TUNED = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
)  # fmt: skip


@cache
def keep() -> bool:
    """From now on, for the whole process; whether this C library does it."""
    return _set((_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEEP))


@cache
def share() -> bool:
    """New threads take what others gave back; whether this C library does it.

    For threads that make few large tensors. Those that make many small objects, such as a
    tokenizer's, would wait for each other.
    """
    return _set((_ARENA_MAX, 1))


def _set(*values: tuple[int, int]) -> bool:
    mallopt = _mallopt()
    return mallopt is not None and all(mallopt(which, size) == 1 for which, size in values)


def _mallopt() -> Callable[[int, int], Any] | None:
    """None where there is none, or where whoever started this process chose other values."""
    if any(name in os.environ for name in _TUNED):
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        found: Callable[[int, int], Any] = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return found
