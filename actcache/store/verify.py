"""Check a store byte by byte: every object's size and sha256, every record's digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from actcache.store.canaries import named_canary_files, read_canary
from actcache.store.errors import DamagedError, ObjectMissingError, StoreError
from actcache.store.files import blocks, file_size
from actcache.store.ids import bytes_digest, digest, store_digest
from actcache.store.layout import STORE_JSON, VOCAB_JSON
from actcache.store.places import Location, Remote, each, insist, relative
from actcache.store.reader import Segment, Snapshot, Store
from actcache.store.schema import StoredObject
from actcache.store.untrusted import MAX_JSON_BYTES, read_file


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
    for file in named_canary_files(snapshot):
        yield from _check_canary(snapshot.store, file)


def _check_canary(store: Store, file: Location) -> Iterator[Check]:
    try:
        canary = read_canary(store, file)
    except StoreError as e:
        yield Check(relative(store.path, file), 0, str(e))
        return
    yield from _check_objects(store.path, canary.record.objects)


def _check_objects(root: Location, objects: Iterable[StoredObject]) -> Iterator[Check]:
    def check(stored: StoredObject) -> Check:
        problem = _problem(root, root / stored.key, stored.bytes, stored.sha256)
        return Check(stored.key, stored.bytes, problem)

    yield from each(root, check, objects) if isinstance(root, Remote) else map(check, objects)


def _check_identity(snapshot: Snapshot) -> Check:
    found = snapshot.store.identity
    stream = digest(found.token_stream)
    store = store_digest(stream, found.host)
    if (stream, store) != (found.token_stream_id, found.store_id):
        return Check(STORE_JSON, 0, "its ids do not follow from its fields")
    root = snapshot.store.path

    def act() -> int:
        data = read_file(root, root / STORE_JSON, MAX_JSON_BYTES)
        if bytes_digest(data) != snapshot.record.identity_sha256:
            raise DamagedError("bytes do not match the digest in the snapshot")
        return len(data)

    try:
        return Check(STORE_JSON, insist(root, act))
    except DamagedError as e:
        return Check(STORE_JSON, 0, str(e))


def _check_vocab(snapshot: Snapshot) -> Check:
    try:
        n = len(snapshot.vocab())
    except DamagedError as e:
        return Check(VOCAB_JSON, 0, str(e))
    return Check(VOCAB_JSON, n)


def _check_segment(segment: Segment) -> Iterator[Check]:
    try:
        commits = segment.commits
        for special in (False, True):
            for hook in segment.hooks:
                segment.stats(hook, special)
    except StoreError as e:
        yield Check(f"commits of {segment.id}", 0, str(e))
        return
    for commit in commits:
        yield from _check_objects(segment.root, commit.objects)
    try:
        table = segment.tokens().digest()
    except DamagedError:
        return  # its objects are named above
    if any(table != c.token_digest for c in commits):
        yield Check(f"tokens of {segment.id}", 0, "token table differs from the committed digest")


def _problem(root: Location, path: Location, size: int, sha256: str) -> str:
    def act() -> None:
        found = file_size(root, path)
        if found != size:
            raise DamagedError(f"has {found:,} bytes, expected {size:,}")
        digest = hashlib.sha256()
        for block in blocks(root, path):
            digest.update(block)
        if f"sha256:{digest.hexdigest()}" != sha256:
            raise DamagedError("bytes do not match their digest")

    try:
        insist(path, act)
    except ObjectMissingError:
        return "is missing"
    except DamagedError as e:
        return str(e)
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    return ""
