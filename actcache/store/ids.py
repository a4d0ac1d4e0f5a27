"""Identity: sha256 of canonical JSON, and a field-by-field diff when two identities differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from actcache.store.places import Location, Remote


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, no NaN: equal values give equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """'sha256:' + hex of the canonical JSON."""
    return f"sha256:{hashlib.sha256(canonical_json(value)).hexdigest()}"


def store_digest(token_stream_id: str, host: Mapping[str, Any]) -> str:
    """Identity of a store: the token stream and the host that read it."""
    return digest({"token_stream_id": token_stream_id, "host": host})


def activation_digest(
    store_id: str, module: str, io: str, index: int | str | None, dtype: str
) -> str:
    """Identity of one hook's rows: the store, the tensor, the storage type."""
    place = {"module": module, "io": io, "index": index}
    return digest({"store_id": store_id, "hook": place, "dtype": dtype})


def bytes_digest(data: bytes | memoryview) -> str:
    """'sha256:' + hex of raw bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def file_digest(path: Location) -> str:
    """'sha256:' + hex of a file's bytes, read once in blocks."""
    if isinstance(path, Remote):
        sha256 = hashlib.sha256()
        for block in path.client.blocks(path.key):
            sha256.update(block)
        return f"sha256:{sha256.hexdigest()}"
    with path.open("rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"


def short(identity: str) -> str:
    """The 12 hex digits people look at."""
    return identity.removeprefix("sha256:")[:12]


def diff(found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines 'key: found … , asked …' for every leaf that differs."""
    for key, a, b in leaves(found, asked, prefix):
        yield f"{key}: the store has {a}, you asked for {b}"


def leaves(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(key, value in a, value in b) of every leaf that differs, values as short text."""
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key, "(absent)"), b.get(key, "(absent)")
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from leaves(x, y, f"{prefix}{key}.")
        elif x != y:
            yield f"{prefix}{key}", _brief(x), _brief(y)


def _brief(value: Any, limit: int = 120) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= limit else text[: limit - 1] + "…"
