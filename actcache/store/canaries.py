"""Canaries: a few contexts of a store with their activations, for readers to compute again.

Digests say that bytes are what was written. They cannot say that the reader's own model, with its
revision, rope scaling and number type, is the one that wrote them. So each set of hooks is stored
once more for up to eight contexts, each run alone (batch 1) and kept in float32. A canary is one
zarr group of the same form as a segment, in (ctx, pos) order, under a record that is its commit.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.store import layout
from actcache.store.errors import DamagedError
from actcache.store.files import remove
from actcache.store.ids import digest
from actcache.store.places import Location, Remote, each, listable
from actcache.store.publish import publish
from actcache.store.reader import Snapshot, Store, read_record, read_table
from actcache.store.schema import (
    MAX_ROWS,
    HookInfo,
    Record,
    StoredObject,
    dump,
    tag,
    vet_objects,
)
from actcache.store.shard import ShardReader
from actcache.store.untrusted import names_in
from actcache.store.writer import publish_group

CONTEXTS = 8
MAX_TOKENS = 8192  # of all contexts together: fewer of them where contexts are long
FOLDER = re.compile(rf"{layout.CANARIES}/[0-9a-f]{{12}}\.[0-9a-f]{{8}}")
_FILE = re.compile(r"[0-9a-f]{12}\.json")


@dataclass(frozen=True, kw_only=True)
class CanaryRecord(Record):
    """canaries/<tag>.json: the commit of one canary."""

    store_id: str
    folder: str  # the zarr group, canaries/<tag>.<8 hex>
    segment: str  # where the contexts come from
    contexts: tuple[int, ...]  # their numbers there; here they are numbered from 0
    rows: int
    token_digest: str
    hooks: tuple[HookInfo, ...]  # dtype is float32; activation_id is that of the segments' rows
    objects: tuple[StoredObject, ...]
    writer: dict[str, Any] = field(default_factory=dict)
    checksum: str = ""  # of this record with an empty checksum
    format_version: int = layout.FORMAT_VERSION

    def sealed(self) -> CanaryRecord:
        """The same record with its checksum filled in."""
        return replace(self, checksum=digest(asdict(replace(self, checksum=""))))

    @property
    def tag(self) -> str:
        return tag(h.activation_id for h in self.hooks)

    def vet(self) -> None:
        here = f"canary {self.tag}"
        if not FOLDER.fullmatch(self.folder) or not 0 < self.rows <= MAX_ROWS:
            raise DamagedError(f"{here} names folder {self.folder!r:.80} with {self.rows} rows")
        if not 0 < len(self.contexts) <= self.rows or any(h.dtype != "float32" for h in self.hooks):
            raise DamagedError(f"{here} has {len(self.contexts)} contexts, or is not float32")
        vet_objects(here, self.folder, self.rows, self.hooks, self.objects)
        if self != self.sealed():
            raise DamagedError(f"{here} does not match its own checksum")


@dataclass(frozen=True)
class Canary:
    """Contexts of a store with the activations of some of its hooks, in (ctx, pos) order."""

    root: Location
    record: CanaryRecord

    @property
    def hooks(self) -> Mapping[str, HookInfo]:
        return {h.name: h for h in self.record.hooks}

    def tokens(self) -> layout.TokenTable:
        """The token table, (rows,). DamagedError."""
        what = f"canary {self.record.tag}"
        table = read_table(self.root, self.root / self.record.folder, self.record.rows, what)
        # Numbered from 0 without a gap: contexts can be counted on to exist.
        steps = np.diff(table.ctx.astype(np.int64), prepend=-1, append=len(self.record.contexts))
        if table.digest() != self.record.token_digest or ((steps < 0) | (steps > 1)).any():
            raise DamagedError(f"{what}: its token table is not the one that was committed")
        return table

    def acts(self, hook: str) -> NDArray[np.float32]:
        """Activations (rows, d). DamagedError, also if they are not finite."""
        info, what = self.hooks[hook], f"canary {self.record.tag}, hook {hook}"
        path = self.root / self.record.folder / "acts" / info.key / "c" / "0" / "0"
        rows: NDArray[np.float32] = ShardReader(
            self.root, path, info, self.record.rows, what
        ).read()
        if not np.isfinite(rows).all():
            raise DamagedError(f"{what}: activations are not finite")
        return rows


def canary_files(root: Location) -> Sequence[Location]:
    """Records of the canaries of the store at `root`."""
    return names_in(root, layout.CANARIES, _FILE)


def named_canary_files(snapshot: Snapshot) -> Sequence[Location]:
    """Records of the canaries of a snapshot's store, also where nothing can be listed.

    There those are looked for that have the tag of a commit.
    """
    root = snapshot.store.path
    if not isinstance(root, Remote) or listable(root):
        return canary_files(root)
    tags = sorted({file.split(".")[1] for s in snapshot.segments for file in s.entry.commits})
    files = [root / layout.CANARIES / f"{tag}.json" for tag in tags]
    there = each(root, Remote.is_file, files)
    return [file for file, is_there in zip(files, there, strict=True) if is_there]


def read_canary(store: Store, file: Location) -> Canary:
    """One canary of `store`. DamagedError."""
    record = read_record(CanaryRecord, store.path, file)
    if record.store_id != store.store_id or file.name != f"{record.tag}.json":
        raise DamagedError(f"{file} belongs to another store, or has another's name")
    return Canary(store.path, record)


def canaries(store: Store) -> Iterator[Canary]:
    """All canaries of a store; they need not cover every hook. DamagedError."""
    listed = listable(store.path)
    for file in canary_files(store.path) if listed else named_canary_files(store.snapshot()):
        yield read_canary(store, file)


def canary_file(root: Location, activation_ids: set[str]) -> Location:
    """Where the record of the canary of these hooks lies, or would lie."""
    return root / layout.CANARIES / f"{tag(activation_ids)}.json"


def write_canary(
    root: Location,
    *,
    store_id: str,
    segment: str,
    contexts: Sequence[int],
    tokens: layout.TokenTable,
    acts: Sequence[tuple[HookInfo, NDArray[np.float32]]],
    writer: Mapping[str, Any],
) -> None:
    """Publish a canary, unless another writer's of the same hooks is there; then that one stays.

    `tokens` and `acts` (rows, d) are in (ctx, pos) order. Raises OutOfSpaceError, StoreError.
    """
    ids = {info.activation_id for info, _ in acts}
    folder = f"{layout.CANARIES}/{tag(ids)}.{uuid.uuid4().hex[:8]}"
    record = CanaryRecord(
        store_id=store_id,
        folder=folder,
        segment=segment,
        contexts=tuple(contexts),
        rows=len(tokens),
        token_digest=tokens.digest(),
        hooks=tuple(info for info, _ in acts),
        objects=tuple(publish_group(root, folder, tokens, acts)),
        writer=dict(writer),
    )
    try:
        publish(canary_file(root, ids), dump(record.sealed()))
    except FileExistsError:
        remove(root / folder)
