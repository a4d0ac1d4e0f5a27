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
    for key in sorted(found.keys() | asked.keys()):
        a, b = found.get(key, "(absent)"), asked.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from diff(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: the store has {_brief(a)}, you asked for {_brief(b)}"


def _brief(value: Any, limit: int = 120) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= limit else text[: limit - 1] + "…"
