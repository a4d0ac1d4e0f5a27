"""Names, constants and the row permutation of a store. FORMAT.md is the specification."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from actcache.store.errors import SettingsError
from actcache.store.split import splitmix64

FORMAT = "actcache"
FORMAT_VERSION = 1

STORE_JSON = "store.json"
VOCAB_JSON = "vocab.json"
SEGMENTS = "segments"
COMMITS = "commits"
SNAPSHOTS = "snapshots"
CANARIES = "canaries"
CALIBRATIONS = "calibrations"
CLAIMS = "claims"
FOLDERS = (SEGMENTS, COMMITS, SNAPSHOTS, CANARIES, CALIBRATIONS, CLAIMS)

FLAG_SPECIAL = 1  # a special token of the tokenizer (separator, BOS, ...)
FLAG_DOC_START = 2  # first token of a document
FLAG_BOS = 4  # put in front of a context, belongs to no document's text
FLAG_IMAGE = 8  # stands for a piece of an image
ROLE_SHIFT = 4  # bits 4 to 6: who wrote the token, an index into ROLES
# none: not a chat, or put there by the chat template; other: a role with none of these names.
ROLES = ("none", "system", "user", "assistant", "tool", "other")

DTYPES: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),  # with a scale per row, see int8.py
}
StorageType = Literal["bfloat16", "float16", "float32", "int8"]
Order = Literal["permuted", "context"]
Modality = Literal["all", "text", "image"]


@dataclass(frozen=True)
class TokenTable:
    """One row per stored token, in stored order. All arrays have shape (n,)."""

    token_id: NDArray[np.uint32]
    doc: NDArray[np.uint64]  # document key, see split.doc_key
    ctx: NDArray[np.uint32]  # number of the context inside the segment
    pos: NDArray[np.uint32]  # position inside the context that the host saw
    flags: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.token_id)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> TokenTable:
        """The table of the chosen rows, in that order."""
        return TokenTable(*(getattr(self, name)[rows] for name in TOKEN_COLUMNS))

    def digest(self) -> str:
        """sha256 over the columns' little-endian bytes in the order of the format."""
        h = hashlib.sha256()
        for name, dtype in TOKEN_COLUMNS.items():
            h.update(np.ascontiguousarray(getattr(self, name), dtype=dtype).tobytes())
        return f"sha256:{h.hexdigest()}"


TOKEN_COLUMNS: dict[str, np.dtype[np.generic]] = {
    "token_id": np.dtype("<u4"),
    "doc": np.dtype("<u8"),
    "ctx": np.dtype("<u4"),
    "pos": np.dtype("<u4"),
    "flags": np.dtype("u1"),
}
assert tuple(TOKEN_COLUMNS) == tuple(f.name for f in fields(TokenTable))


def roles_of(flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Index into ROLES of each row, same shape as `flags`."""
    roles: NDArray[np.uint8] = (flags >> np.uint8(ROLE_SHIFT)) & np.uint8(7)
    return roles


def eligible(
    flags: NDArray[np.uint8],
    *,
    skip_special: bool = True,
    modality: Modality = "all",
    roles: Sequence[str] | None = None,
) -> NDArray[np.bool_]:
    """Which rows a reader wants, by their flags; same shape as `flags`.

    `roles` are names of ROLES, None is all of them. SettingsError for a name that is not known.
    """
    if modality not in ("all", "text", "image"):
        raise SettingsError(f"modality={modality}: expected all, text or image")
    keep = np.ones(np.shape(flags), dtype=np.bool_)
    if skip_special:
        keep &= (flags & FLAG_SPECIAL) == 0
    if modality != "all":
        keep &= ((flags & FLAG_IMAGE) != 0) == (modality == "image")
    if roles is not None:
        keep &= np.isin(roles_of(flags), [_role(name) for name in roles])
    return keep


def _role(name: str) -> int:
    if name not in ROLES:
        raise SettingsError(f"roles: expected names of {', '.join(ROLES)}, got {name!r}")
    return ROLES.index(name)


def segment_id(unit: int, index: int) -> str:
    """'u00003-0007': the 8th segment of input unit 3."""
    return f"u{unit:05d}-{index:04d}"


SEGMENT_ID = re.compile(r"u[0-9]{5,12}-[0-9]{4,12}")


def permutation(segment: str, n: int) -> NDArray[np.int64]:
    """perm[i] = which row, in (ctx, pos) order, is stored at row i; a function of (segment, n).

    Rows are sorted by splitmix64(key + i): a keyed shuffle that needs no random generator, so that
    any language can redo it.
    """
    seed = hashlib.sha256(f"actcache-rows-v1:{segment}".encode()).digest()[:8]
    key = np.uint64(int.from_bytes(seed, "little"))
    with np.errstate(over="ignore"):
        ranks = splitmix64(np.arange(n, dtype=np.uint64) + key)
    order: NDArray[np.int64] = np.argsort(ranks, kind="stable")
    return order


def chunk_rows(d: int, itemsize: int, chunk_bytes: int, n_rows: int) -> int:
    """Rows of an inner chunk: whole rows, about `chunk_bytes`, at most the segment."""
    return max(1, min(n_rows, chunk_bytes // (d * itemsize)))
