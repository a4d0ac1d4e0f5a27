"""Open a store: identity, snapshots, segments. Needs numpy only; nothing is listed but snapshots.

A reader sees a snapshot, a frozen list of commits, so a store that grows under a running training
job changes nothing for it. Whatever is not committed does not exist for a reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.store import layout
from actcache.store.errors import DamagedError, HookMissingError, StoreError, StoreMissingError
from actcache.store.hooknames import canonical
from actcache.store.ids import bytes_digest, short
from actcache.store.int8 import Error
from actcache.store.int8_reader import Int8Reader
from actcache.store.listing import commit_files as commit_files
from actcache.store.listing import is_snapshot
from actcache.store.listing import snapshot_numbers as snapshot_numbers
from actcache.store.places import Location, Remote, each, insist, listable, place
from actcache.store.records import did_you_mean
from actcache.store.schema import (
    Commit,
    CommittedHook,
    HookInfo,
    Identity,
    Quantised,
    Record,
    SnapshotEntry,
    SnapshotRecord,
    load,
)
from actcache.store.shard import ShardReader, check_crc
from actcache.store.stats import HookStats, MergedStats
from actcache.store.untrusted import MAX_JSON_BYTES, read_file
from actcache.store.vocab import decode_vocab

T = TypeVar("T", bound=Record)


def read_record(cls: type[T], root: Location, path: Location, sha256: str | None = None) -> T:
    """A JSON record of the store at `root`.

    Raises DamagedError if it is missing, unlike its digest, malformed, or outside the store.
    """
    return insist(path, lambda: _read_record(cls, root, path, sha256))


def _read_record(cls: type[T], root: Location, path: Location, sha256: str | None = None) -> T:
    data = read_file(root, path, MAX_JSON_BYTES)
    if sha256 is not None and bytes_digest(data) != sha256:
        raise DamagedError(f"{path} does not match the digest that the snapshot has of it")
    return load(cls, data, path)


def open_store(path: str | Location) -> Store:
    """The store at `path`: a folder, s3://bucket/prefix, or http(s)://….

    Raises StoreMissingError if there is none, StoreVersionError if its format is newer, RemoteError
    if a server does not answer or refuses.
    """
    root = place(path)
    if not (root / layout.STORE_JSON).is_file():
        if isinstance(root, Remote) and listable(root):
            root.names()  # says what else is wrong: no such bucket, no permission
        is_place = isinstance(root, Remote) or root.is_dir()
        here = "is not a store (no store.json)" if is_place else "does not exist"
        raise StoreMissingError(
            f"store={path}: {root} {here}. Make one with: actcache run host=… data=… store={path}"
        )
    return Store(root, read_record(Identity, root, root / layout.STORE_JSON))


@dataclass(frozen=True)
class Store:
    """A store. `path` says where, a folder or a server; `identity` what its rows are."""

    path: Location
    identity: Identity

    @property
    def store_id(self) -> str:
        return self.identity.store_id

    @property
    def token_stream_id(self) -> str:
        return self.identity.token_stream_id

    def snapshot_names(self) -> list[str]:
        """Names of the snapshots, oldest first."""
        return [str(n) for n in snapshot_numbers(self.path)]

    def snapshot(self, name: str | None = None) -> Snapshot:
        """The snapshot called `name`, or the newest.

        Raises StoreMissingError if nothing was committed yet or there is no such snapshot.
        """
        if name is not None and is_snapshot(self.path, str(name)):
            return self._open(str(name))
        names = self.snapshot_names()
        if not names:
            raise StoreMissingError(
                f"{self.path} has no snapshot: its first run was interrupted before it finished. "
                "Run the same actcache command again; it continues where it stopped"
            )
        if name is not None:
            raise StoreMissingError(
                f"{self.path} has no snapshot {name!r}; it has {', '.join(names)}"
            )
        return self._open(names[-1])

    def _open(self, name: str) -> Snapshot:
        file = self.path / layout.SNAPSHOTS / f"{name}.json"

        def act() -> Snapshot:
            record = _read_record(SnapshotRecord, self.path, file)
            if record.name != name:
                raise DamagedError(f"{file} says that it is snapshot {record.name!r:.40}")
            self._refuse_changed(record)
            return Snapshot(self, record)

        return insist(file, act)

    def _refuse_changed(self, record: SnapshotRecord) -> None:
        """DamagedError if `identity` is not what a server has, which the snapshot vouches for."""
        if isinstance(self.path, Remote):
            file = self.path / layout.STORE_JSON
            there = _read_record(Identity, self.path, file, record.identity_sha256)
            if there != self.identity:
                raise DamagedError(f"{file} was damaged on its way here; open the store again")


@dataclass(frozen=True)
class Snapshot(MergedStats):
    """A frozen view of a store."""

    store: Store
    record: SnapshotRecord

    def __post_init__(self) -> None:
        if self.record != self.record.sealed():
            raise DamagedError(
                f"{self.store.path}: snapshot {self.record.name} does not match its own checksum"
            )
        if self.record.store_id != self.store.store_id:
            raise DamagedError(
                f"{self.store.path}: snapshot {self.record.name} belongs to another store, "
                f"{short(self.record.store_id)}"
            )

    name = property(lambda self: self.record.name)
    store_id = property(lambda self: self.store.store_id)
    token_stream_id = property(lambda self: self.store.token_stream_id)
    context = property(lambda self: self.store.identity.layout.context)
    n_rows = property(lambda self: self.record.rows)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        if not self.record.segments:
            return ()
        first = self._segment(self.record.segments[0])
        others = (self._segment(e, first) for e in self.record.segments[1:])
        segments = (first, *others)
        if isinstance(self.store.path, Remote):
            each(self.store.path, Segment.fetch, segments)
        return segments

    def _segment(self, entry: SnapshotEntry, first: Segment | None = None) -> Segment:
        return Segment(self.store.path, entry, first)

    @cached_property
    def hooks(self) -> Mapping[str, HookInfo]:
        """Hooks that every segment has, by canonical name."""
        if not self.segments:
            return {}
        infos = self.segments[0].hooks
        lost = [name for name in self.record.hooks if name not in infos]
        if lost:
            raise DamagedError(
                f"{self.store.path}: snapshot {self.record.name} lists hook {lost[0]!r:.200}, "
                f"which segment {self.segments[0].id} does not have"
            )
        return {name: infos[name] for name in self.record.hooks}

    def resolve_hook(self, name: str) -> str:
        """The stored name of a hook given as alias, TransformerLens name or module path.

        Raises HookMissingError listing what the store has.
        """
        wanted = canonical(name)
        if wanted in self.hooks:
            return wanted
        # Stored module paths leave out the prefix of the base model (gpt_neox., model.).
        prefix = str(self.store.identity.recorded.get("base_model_prefix", ""))
        path = wanted.removeprefix(f"{prefix}.")
        for info in self.hooks.values():
            side = "" if info.io == "out" else ":in"
            if info.index is None and path == f"{info.module}{side}":
                return info.name
        raise HookMissingError(
            f"hook {name!r} is not in {self.store.path}.{did_you_mean(wanted, self.hooks)} "
            f"It has: {', '.join(self.hooks)}"
        )

    def storage_error(self, hook: str) -> Error | None:
        """What storing a hook as int8 has changed, over the snapshot; None for other types.

        Segments whose own FVU is undefined (a single row, say) do not count in it.
        """
        name, lost, worst = self.resolve_hook(hook), 0.0, 0.0
        if self.hooks[name].dtype != "int8":
            return None
        for segment in self.segments:
            found = segment.quantised(name)
            lost += (found.fvu or 0.0) * float(segment.stats(name).m2.sum())
            worst = max(worst, found.max_relative_error)
        total = float(self.stats(name).m2.sum())
        return Error(lost / total if total > 0 else None, worst)

    def vocab(self) -> list[bytes]:
        """The exact bytes of every token id."""
        path = self.store.path / layout.VOCAB_JSON

        def act() -> list[bytes]:
            data = read_file(self.store.path, path, MAX_JSON_BYTES)
            if bytes_digest(data) != self.store.identity.files.get(layout.VOCAB_JSON):
                raise DamagedError(f"{path} does not match the digest in {layout.STORE_JSON}")
            return decode_vocab(data, path)

        return insist(path, act)


@dataclass(frozen=True)
class Segment:
    """One segment: its token table and its hooks, all with the same rows in the same order."""

    root: Location
    entry: SnapshotEntry
    first: Segment | None = None  # of the snapshot: hooks are the same in all of them

    id = property(lambda self: self.entry.segment)
    n_rows = property(lambda self: self.entry.rows)

    @cached_property
    def commits(self) -> tuple[Commit, ...]:
        folder = self.root / layout.COMMITS
        return tuple(
            self._own(read_record(Commit, self.root, folder / file, sha256), file)
            for file, sha256 in sorted(self.entry.commits.items())
        )

    def fetch(self) -> None:
        """Read the commits now; what is wrong with them is raised where they are used."""
        with contextlib.suppress(StoreError):
            _ = self.commits

    def _own(self, commit: Commit, file: str) -> Commit:
        """`commit`, if it is of this segment's rows."""
        if (commit.file, commit.rows) != (file, self.entry.rows):
            raise DamagedError(
                f"commits/{file} is a commit of {commit.rows:,} rows that belongs under "
                f"{commit.file}; the snapshot says {self.entry.rows:,} rows"
            )
        return commit

    @property
    def path(self) -> Location:
        """The zarr group of the first commit: its token table and the hooks captured with it."""
        return self.root / self.commits[0].folder

    @cached_property
    def hooks(self) -> dict[str, HookInfo]:
        return {h.info.name: h.info for c in reversed(self.commits) for h in c.hooks}

    def stats(self, hook: str, special: bool = False) -> HookStats:
        """Statistics of this segment's rows. DamagedError if they are not of so many rows."""
        committed = self._find(hook)[1]
        found, rows = committed.stats(special), self.n_rows
        if found.n > rows or (special and found.n != rows):
            raise DamagedError(
                f"segment {self.id}, hook {hook}: statistics of {found.n:,} rows, it has {rows:,}"
            )
        return found

    def quantised(self, hook: str) -> Quantised:
        """The error that the commit records of an int8 hook. DamagedError if it has none."""
        found = self._find(hook)[1].int8
        if found is None:
            raise DamagedError(f"segment {self.id}, hook {hook}: not int8, as other segments")
        return found

    def _find(self, hook: str) -> tuple[Commit, CommittedHook]:
        for commit in self.commits:
            for committed in commit.hooks:
                if committed.info.name == hook:
                    self._like_first(committed)
                    return commit, committed
        raise HookMissingError(f"segment {self.id} has no hook {hook!r}")

    def _like_first(self, committed: CommittedHook) -> None:
        info = committed.info
        expected = self.first.hooks.get(info.name) if self.first else None
        if expected and (info.d, info.dtype) != (expected.d, expected.dtype):
            raise DamagedError(
                f"segment {self.id}, hook {info.name}: {info.d} channels of {info.dtype}; segment "
                f"{self.first.id if self.first else ''} has {expected.d} of {expected.dtype}"
            )
        if committed.int8 and self.first and info.name in self.first.hooks:
            other = self.first._find(info.name)[1].int8
            if other is None or other.calibration != committed.int8.calibration:
                raise DamagedError(
                    f"segment {self.id}, hook {info.name}: its calibration is not the one of "
                    f"segment {self.first.id}; a store has one per hook"
                )

    def tokens(self) -> layout.TokenTable:
        """The token table, checksums checked."""
        return read_table(self.root, self.path, self.n_rows, f"segment {self.id}")

    def column(self, name: str) -> NDArray[Any]:
        """One column of the token table (n_rows,), its checksum checked."""
        path = self.path / "tokens" / name / "c" / "0"
        what = f"segment {self.id}, tokens/{name}"
        return _read_column(self.root, path, layout.TOKEN_COLUMNS[name], self.n_rows, what)

    def norms(self, hook: str) -> NDArray[np.float32]:
        """Length of each row of a hook (n_rows,), checksum checked.

        Raises StoreError if the hook was written without them (before they were part of a store).
        """
        commit, committed = self._find(hook)
        what = f"segment {self.id}, hook {hook}"
        if not committed.info.norms:
            raise StoreError(
                f"{what} was written without the lengths of its rows; stores made from now on "
                "have them, and so have smaller copies by actcache requantise"
            )
        path = self.root / commit.folder / "norms" / committed.info.key / "c" / "0"
        return _read_column(self.root, path, np.dtype("<f4"), self.n_rows, f"{what}, norms")

    def acts(self, hook: str) -> ShardReader:
        """Reader of one hook's rows, (n_rows, d)."""
        commit, committed = self._find(hook)
        info = committed.info
        path = self.root / commit.folder / "acts" / info.key / "c" / "0" / "0"
        what = f"segment {self.id}, hook {hook}"
        if committed.int8 is not None:
            group, calibration = self.root / commit.folder, committed.int8.calibration
            return Int8Reader(self.root, group, info, self.n_rows, what, calibration)
        return ShardReader(self.root, path, info, self.n_rows, what)


def read_table(root: Location, group: Location, n: int, what: str) -> layout.TokenTable:
    """The token table of `n` rows in the zarr group `group`, checksums checked. DamagedError."""

    def column(name: str) -> NDArray[Any]:
        path = group / "tokens" / name / "c" / "0"
        return _read_column(root, path, layout.TOKEN_COLUMNS[name], n, f"{what}, tokens/{name}")

    return checked_table(layout.TokenTable(*each(root, column, layout.TOKEN_COLUMNS)), n, what)


def checked_table(table: layout.TokenTable, n: int, what: str) -> layout.TokenTable:
    """`table`. DamagedError if it numbers contexts or positions beyond its `n` rows."""
    if max(table.ctx.max(), table.pos.max()) >= n:
        raise DamagedError(f"{what}: a number of a context or position is beyond its {n:,} rows")
    return table


def _read_column(
    root: Location, path: Location, dtype: np.dtype[Any], n: int, what: str
) -> NDArray[Any]:
    def act() -> NDArray[Any]:
        try:
            data = read_file(root, path, n * dtype.itemsize + 4, exact=True)
        except DamagedError as e:
            raise DamagedError(f"{what}: {e}") from e
        return np.frombuffer(check_crc(data, what), dtype=dtype)

    return insist(path, act)
