"""Held-out documents, chosen by a hash of the document: the same in every store and every run.

A document is named by a 64-bit key, the hash of its id (or of its text where it has no id), so a
text that appears twice, or in two stores, is on the same side of the split everywhere.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
_GOLDEN = U64(0x9E3779B97F4A7C15)


def doc_key(doc_id: str) -> int:
    """First 8 bytes, little endian, of sha256(id in UTF-8)."""
    return int.from_bytes(hashlib.sha256(doc_id.encode()).digest()[:8], "little")


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> U64(31))
    return mixed


def held_out(doc: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which document keys are held out: (n,) bool. Growing `fraction` only adds documents."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"held_out_fraction: expected 0 <= fraction < 1, got {fraction}")
    # Hashed once more, so that the split is independent of any other use of the key.
    mixed: NDArray[np.bool_] = splitmix64(doc) < U64(int(fraction * 2.0**64))
    return mixed
