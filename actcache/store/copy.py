"""Copy a snapshot of a store to another place, every byte checked on the way.

What a snapshot names is copied in the order in which it was written: identity, objects, commits,
and the snapshot record last, each published whole or not at all. So an interrupted copy is a store
without that snapshot, and the same copy again continues: files that are there with the right size
and digest stay. Ids do not depend on the place, the copy keeps them.

A copy of some hooks takes the commits that hold them, whole. It is a snapshot of its own, since it
names fewer commits.

Cost: each byte is read once, hashed and written once; a continued copy reads again what is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actcache.store import layout
from actcache.store.canaries import named_canary_files, read_canary
from actcache.store.errors import DamagedError, IdentityError, StoreError
from actcache.store.files import blocks, file_size
from actcache.store.ids import file_digest
from actcache.store.objects import Buffer
from actcache.store.places import (
    Location,
    address,
    insist,
    place,
    refuse_unwritable,
    relative,
)
from actcache.store.publish import publish, publishing
from actcache.store.reader import Segment, Snapshot, Store, open_store
from actcache.store.schema import Commit, SnapshotEntry, SnapshotRecord, dump
from actcache.store.untrusted import MAX_JSON_BYTES, inside
from actcache.store.writer import identity_diff, refuse_strangers


@dataclass(frozen=True)
class Copied:
    """What a copy did."""

    store: Store
    snapshot: str
    copied: int  # files written now
    kept: int  # files that were there already, whole
    bytes: int  # written now


@dataclass(frozen=True)
class _File:
    """A file to copy: `bytes` is None for records, whose size nothing tells."""

    key: str
    sha256: str
    bytes: int | None = None


def copy_bytes(source: Snapshot, hooks: Sequence[str] | None = None) -> int:
    """Bytes of the objects that `copy_snapshot` will copy or check."""
    return sum(f.bytes or 0 for f in _files(source, list(_chosen(source, hooks))))


def copy_snapshot(
    source: Snapshot,
    target: str | Location,
    hooks: Sequence[str] | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Copied:
    """Copy `source` to `target`, new or a copy of the same store: a folder or s3://bucket/prefix.

    `hooks` None: all. `advance(bytes)` is called as objects get done. Raises DamagedError for bytes
    that do not match their digest (nothing wrong is published), IdentityError or StoreError for a
    target that holds something else, OutOfSpaceError.
    """
    target = place(target)
    refuse_unwritable(target)
    chosen = list(_chosen(source, hooks))
    record = _view(source.record, chosen) if hooks is not None else source.record
    _refuse_place(source, target)
    written: list[int] = []
    kept = 0
    for file in _files(source, chosen):
        size = _copy_file(source.store.path, target, file)
        written += [] if size is None else [size]
        kept += size is None
        advance(file.bytes or 0)
    copy = open_store(target)
    name = _publish_view(copy, record) if record is not source.record else _publish(copy, record)
    return Copied(copy, name, len(written), kept, sum(written))


# -- what to copy ----------------------------------------------------------------------------------


def _chosen(
    source: Snapshot, hooks: Sequence[str] | None
) -> Iterator[tuple[Segment, list[Commit]]]:
    """Segments with the commits to copy. HookMissingError for a hook that is not there."""
    wanted = None if hooks is None else {source.resolve_hook(h) for h in hooks}
    for segment in source.segments:
        yield (
            segment,
            [
                c
                for c in segment.commits
                if wanted is None or wanted & {h.info.name for h in c.hooks}
            ],
        )


def _files(source: Snapshot, chosen: list[tuple[Segment, list[Commit]]]) -> Iterator[_File]:
    """Everything but the snapshot record, in the order of publication."""
    for name, sha256 in sorted(source.store.identity.files.items()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise DamagedError(f"{source.store.path}: {layout.STORE_JSON} names the file {name!r}")
        yield _File(name, sha256)
    yield _File(layout.STORE_JSON, source.record.identity_sha256)
    for segment, commits in chosen:
        for commit in commits:
            for stored in commit.objects:
                yield _File(stored.key, stored.sha256, stored.bytes)
            sha256 = segment.entry.commits[commit.file]
            yield _File(f"{layout.COMMITS}/{commit.file}", sha256)
    yield from _canary_files(source, {h for _, cs in chosen for c in cs for h in _ids(c)})


def _canary_files(source: Snapshot, activation_ids: set[str]) -> Iterator[_File]:
    """The canaries of hooks that are all copied."""
    for file in named_canary_files(source):
        record = read_canary(source.store, file).record
        if {h.activation_id for h in record.hooks} <= activation_ids:
            for stored in record.objects:
                yield _File(stored.key, stored.sha256, stored.bytes)
            yield _File(relative(source.store.path, file), file_digest(file))


def _ids(commit: Commit) -> set[str]:
    return {h.info.activation_id for h in commit.hooks}


def _view(record: SnapshotRecord, chosen: list[tuple[Segment, list[Commit]]]) -> SnapshotRecord:
    """The record of a snapshot of the chosen commits; its name is not settled yet."""
    entries = tuple(
        SnapshotEntry(
            segment=segment.id,
            rows=segment.n_rows,
            commits={c.file: segment.entry.commits[c.file] for c in commits},
        )
        for segment, commits in chosen
    )
    names = [{h.info.name for c in commits for h in c.hooks} for _, commits in chosen]
    hooks = tuple(sorted(set.intersection(*names))) if names else ()
    if (entries, hooks) == (record.segments, record.hooks):
        return record
    return replace(record, segments=entries, hooks=hooks)


# -- where to --------------------------------------------------------------------------------------


def _refuse_place(source: Snapshot, target: Location) -> None:
    """StoreError unless `target` is new, empty, or a copy of this very store."""
    here, there = (f"{address(p)}/" for p in (source.store.path, target))
    if there.startswith(here) or here.startswith(there):
        raise StoreError(f"{target} and {source.store.path}: one lies in the other; copy elsewhere")
    if not (target / layout.STORE_JSON).exists():
        refuse_strangers(target)
        return
    for name in layout.FOLDERS:
        inside(target, target / name)
    lines = identity_diff(open_store(target).identity, source.store.identity)
    if lines:
        lines.insert(0, f"{target} is another store; nothing was copied:")
        raise IdentityError("\n  ".join(lines))
    if file_digest(target / layout.STORE_JSON) != source.record.identity_sha256:
        raise StoreError(
            f"{target} holds the same work as {source.store.path} but was made by itself, it is "
            "no copy. Nothing was copied; choose another folder"
        )


def _copy_file(root: Location, target: Location, file: _File) -> int | None:
    """Bytes written, or None if the file is there already, whole."""
    path = target / file.key
    if path.exists() or (isinstance(path, Path) and path.is_symlink()):
        _refuse_other(root, path, file)
        return None
    try:
        return insist(root, lambda: _publish_copy(root, path, file))
    except FileExistsError:  # another copy at the same time was faster
        _refuse_other(root, path, file)
        return None


def _publish_copy(root: Location, path: Location, file: _File) -> int:
    with publishing(path) as out:
        sha256, size = hashlib.sha256(), 0
        for block in _blocks(root, file):
            sha256.update(block)
            size += len(block)
            out.write(block)
        if f"sha256:{sha256.hexdigest()}" != file.sha256 or file.bytes not in (None, size):
            raise _damaged(root, file, "does not match its digest")
    return size


def _refuse_other(root: Location, path: Location, file: _File) -> None:
    size = path.stat().st_size if isinstance(path, Path) else file_size(path, path)
    if file.bytes not in (None, size) or file_digest(path) != file.sha256:
        raise StoreError(
            f"{path} has other bytes than {file.key} of {root} should have; it is left alone. "
            "Remove it and copy again, or copy to another folder"
        )


def _blocks(root: Location, file: _File) -> Iterator[Buffer]:
    """The source's bytes, no more than recorded."""
    left = MAX_JSON_BYTES if file.bytes is None else file.bytes
    try:
        for block in blocks(root, root / file.key):
            left -= len(block)
            if left < 0:
                raise _damaged(root, file, "is longer than recorded")
            yield block
    except OSError as e:
        raise _damaged(root, file, f"cannot be read: {e.strerror}") from e


def _damaged(root: Location, file: _File, what: str) -> DamagedError:
    return DamagedError(
        f"{root / file.key} {what}; it is not copied. actcache verify {root} lists all damage"
    )


# -- the snapshot ----------------------------------------------------------------------------------


def _publish(copy: Store, record: SnapshotRecord) -> str:
    path = copy.path / layout.SNAPSHOTS / f"{record.name}.json"
    try:
        publish(path, dump(record))
    except FileExistsError:
        if copy.snapshot(record.name).record != record:
            raise StoreError(
                f"{copy.path} has another snapshot {record.name}; copy to another folder"
            ) from None
    return record.name


def _publish_view(copy: Store, record: SnapshotRecord) -> str:
    """Publish under the next free number, unless the same view is there."""
    while True:
        names = copy.snapshot_names()
        for name in names:
            found = copy.snapshot(name).record
            if (found.segments, found.hooks) == (record.segments, record.hooks):
                return name
        number = max([int(n) for n in names] + [int(record.name)]) + 1
        named = replace(record, name=str(number)).sealed()
        try:
            publish(copy.path / layout.SNAPSHOTS / f"{number}.json", dump(named))
        except FileExistsError:
            continue  # another writer took this number
        return named.name
