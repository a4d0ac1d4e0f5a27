"""The catalog: which stores this machine knows, one small JSON per store in a folder.

$ACTCACHE_HOME/catalog (default ~/.cache/actcache/catalog), or one that machines share, such as
s3://bucket/catalog. It is a cache of facts, local knowledge
such as paths, and never trusted: an entry only says where to look. Whether the store is there, and
what it holds now, is read from the store itself. Losing the folder loses nothing: `actcache run`,
`info`, `verify` and `cp` register the store that they touch.

Cost: one JSON of a few KiB per store, read at the start of a run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actcache.store import (
    DamagedError,
    Identity,
    Layout,
    Snapshot,
    Store,
    StoreError,
    StoreMissingError,
    open_store,
)
from actcache.store.errors import RemoteError
from actcache.store.files import remove
from actcache.store.files import replace as replace_file
from actcache.store.ids import digest, short, store_digest
from actcache.store.places import Location, address, each, place
from actcache.store.reader import read_record
from actcache.store.schema import Record, dump
from actcache.store.untrusted import names_in

State = Literal["ok", "missing", "other", "damaged", "unreachable"]
_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{12}\.json")


def home() -> Path:
    """$ACTCACHE_HOME, or ~/.cache/actcache."""
    return Path(os.environ.get("ACTCACHE_HOME") or "~/.cache/actcache").expanduser()


@dataclass(frozen=True, kw_only=True)
class KnownHook:
    """A hook of a registered store."""

    name: str
    d: int
    dtype: str
    activation_id: str


@dataclass(frozen=True, kw_only=True)
class Entry(Record):
    """What the catalog remembers of one store. The path is local; everything else travels."""

    path: str  # absolute, or a URL
    token_stream: dict[str, Any]
    host: dict[str, Any]
    layout: Layout
    token_stream_id: str
    store_id: str
    snapshot: str  # newest when this was written
    tokens: int
    hooks: tuple[KnownHook, ...]  # those of every segment
    bytes: int
    verified: str | None = None  # when `actcache verify` last found every byte whole, UTC
    format_version: int = field(default=1)

    def __post_init__(self) -> None:
        stream = digest(self.token_stream)
        if (stream, store_digest(stream, self.host)) != (self.token_stream_id, self.store_id):
            raise DamagedError("its ids do not follow from its fields")
        if not Path(self.path).is_absolute() and "://" not in self.path:
            raise DamagedError(f"path: expected an absolute path or a URL, got {self.path!r}")

    @property
    def file(self) -> str:
        """Name in the catalog: the work, and where it lies, since it may lie at two places."""
        place = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
        return f"{self.store_id.removeprefix('sha256:')}.{place}.json"


@dataclass(frozen=True)
class Known:
    """A registered store as it is now. `entry` holds fresh facts where `state` is "ok"."""

    entry: Entry
    state: State
    problem: str = ""


class Catalog:
    """The stores registered in one folder; made when something is registered."""

    def __init__(self, folder: str | Location | None = None) -> None:
        """`folder` None: $ACTCACHE_HOME/catalog."""
        self.folder = place(home() / "catalog" if folder is None else folder)

    def register(self, snapshot: Snapshot, verified: str | None = None) -> Entry:
        """Remember the snapshot's store, replacing what was remembered of it at this path.

        Raises StoreError if the catalog cannot be written.
        """
        entry = entry_of(snapshot)
        before = self._read(self.folder / entry.file)
        kept = before.verified if isinstance(before, Entry) else None
        entry = replace(entry, verified=verified or kept)
        _replace(self.folder / entry.file, dump(entry))
        return entry

    def forget(self, entry: Entry) -> None:
        """Remove one entry; its store is not touched."""
        remove(self.folder / entry.file)

    def entries(self) -> tuple[list[Entry], list[str]]:
        """Entries as written, by path; a sentence for each file that is not a whole entry, or for
        a catalog that cannot be read.
        """
        try:
            files = names_in(self.folder, "", _NAME)
        except StoreError as e:
            return [], [f"catalog {self.folder} is ignored: {e}"]
        read = each(self.folder, self._read, files)
        problems = [r for r in read if isinstance(r, str)]
        return sorted((r for r in read if isinstance(r, Entry)), key=lambda e: e.path), problems

    def known(self) -> list[Known]:
        """Every entry, checked against its store."""
        return [look(entry) for entry in self.entries()[0]]

    def same_work(self, identity: Identity) -> list[Known]:
        """Stores that are there and hold exactly this token stream and host, most tokens first."""
        some = (e for e in self.entries()[0] if e.store_id == identity.store_id)
        found = [known for known in map(look, some) if known.state == "ok"]
        return sorted(found, key=lambda k: (-k.entry.tokens, k.entry.path))

    def _read(self, file: Location) -> Entry | str | None:
        """The entry in `file`, what is wrong with it, or None if there is no such file."""
        try:
            if not file.exists():
                return None
            entry = read_record(Entry, self.folder, file)
        except (OSError, StoreError) as e:
            return f"{file} is ignored: {e}"
        return entry if entry.file == file.name else f"{file} is ignored: it has another's name"


def entry_of(snapshot: Snapshot) -> Entry:
    """The facts that the catalog keeps of a store."""
    store = snapshot.store
    hooks = tuple(
        KnownHook(name=name, d=info.d, dtype=info.dtype, activation_id=info.activation_id)
        for name, info in sorted(snapshot.hooks.items())
    )
    return Entry(
        path=address(store.path),
        token_stream=store.identity.token_stream,
        host=store.identity.host,
        layout=store.identity.layout,
        token_stream_id=store.token_stream_id,
        store_id=store.store_id,
        snapshot=snapshot.name,
        tokens=snapshot.n_rows,
        hooks=hooks,
        bytes=sum(o.bytes for s in snapshot.segments for c in s.commits for o in c.objects),
    )


def look(entry: Entry) -> Known:
    """Check an entry against what lies at its path now, and bring its facts up to date."""
    try:
        store = open_store(entry.path)
    except StoreMissingError:
        return Known(entry, "missing", "no store there now; moved, removed or not mounted")
    except RemoteError as e:
        return Known(entry, "unreachable", str(e))
    except StoreError as e:
        return Known(entry, "damaged", str(e))
    try:
        if store.store_id != entry.store_id:
            return Known(entry, "other", f"another store, {short(store.store_id)}, lies there now")
        return Known(_fresh(entry, store), "ok")
    except RemoteError as e:
        return Known(entry, "unreachable", str(e))
    except StoreError as e:
        return Known(entry, "damaged", str(e))


def _fresh(entry: Entry, store: Store) -> Entry:
    """The entry, read anew if the store has another newest snapshot than it remembers."""
    if store.snapshot_names()[-1:] == [entry.snapshot]:
        return replace(entry, layout=store.identity.layout)
    return replace(entry_of(store.snapshot()), verified=entry.verified)


def _replace(path: Location, data: bytes) -> None:
    """Write whole or not at all; unlike a store's files an entry may be replaced."""
    try:
        replace_file(path, data)
    except (OSError, StoreError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise StoreError(
            f"catalog {path.parent} cannot be written: {why}. The store itself is whole; "
            "choose another catalog with catalog=PATH, or set ACTCACHE_HOME"
        ) from e


def continues(entry: Entry, identity: Identity, hooks: Mapping[str, str]) -> bool:
    """Whether a run of `identity` with these hooks (name -> activation id) could go on there.

    Other hooks and fewer tokens are no hindrance; another layout, or the same hook in another
    storage type, is.
    """
    return (
        entry.store_id == identity.store_id
        and entry.layout == identity.layout
        and all(hooks.get(h.name, h.activation_id) == h.activation_id for h in entry.hooks)
    )
