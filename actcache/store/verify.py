"""Check a store byte by byte: every object's size and sha256, every record's digest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.store.errors import DamagedError
from actcache.store.ids import digest, file_digest, store_digest
from actcache.store.layout import STORE_JSON, VOCAB_JSON
from actcache.store.reader import Segment, Snapshot


@dataclass(frozen=True)
class Check:
    """The verdict on one object; `problem` is empty if it is whole."""

    key: str
    bytes: int
    problem: str = ""


def verify(snapshot: Snapshot) -> Iterator[Check]:
    """Check everything the snapshot names, one result per object, damaged or not."""
    yield _check_identity(snapshot)
    yield _check_vocab(snapshot)
    for segment in snapshot.segments:
        yield from _check_segment(segment)


def _check_identity(snapshot: Snapshot) -> Check:
    found = snapshot.store.identity
    stream = digest(found.token_stream)
    store = store_digest(stream, found.host)
    problem = ""
    if (stream, store) != (found.token_stream_id, found.store_id):
        problem = "its ids do not follow from its fields"
    if file_digest(snapshot.store.path / STORE_JSON) != snapshot.record.identity_sha256:
        problem = "bytes do not match the digest in the snapshot"
    return Check(STORE_JSON, (snapshot.store.path / STORE_JSON).stat().st_size, problem)


def _check_vocab(snapshot: Snapshot) -> Check:
    try:
        n = len(snapshot.vocab())
    except DamagedError as e:
        return Check(VOCAB_JSON, 0, str(e))
    return Check(VOCAB_JSON, n)


def _check_segment(segment: Segment) -> Iterator[Check]:
    try:
        commits = segment.commits
    except DamagedError as e:
        yield Check(f"commits of {segment.id}", 0, str(e))
        return
    for commit in commits:
        for stored in commit.objects:
            path = segment.root / stored.key
            yield Check(stored.key, stored.bytes, _problem(path, stored.bytes, stored.sha256))
    if all(c.rows != segment.n_rows for c in commits):
        yield Check(f"commits of {segment.id}", 0, "row counts of commit and snapshot differ")
    try:
        table = segment.tokens().digest()
    except DamagedError:
        return  # its objects are named above
    if any(table != c.token_digest for c in commits):
        yield Check(f"tokens of {segment.id}", 0, "token table differs from the committed digest")


def _problem(path: Path, size: int, sha256: str) -> str:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes, expected {size:,}"
        return "" if file_digest(path) == sha256 else "bytes do not match their digest"
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
