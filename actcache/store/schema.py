"""The JSON records of a store: identity, commits, snapshots. Read strictly, sizes checked first.

Stores come from other teams, so every record is untrusted: parsed with bounds (`untrusted`),
unknown keys refused, names matched against patterns before they touch a path, and what its fields
say about each other compared (`vet`) before anything is allocated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from actcache.store.errors import DamagedError, SettingsError, StoreVersionError
from actcache.store.hooknames import storage_key
from actcache.store.ids import bytes_digest, canonical_json, digest
from actcache.store.layout import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    SEGMENT_ID,
    SEGMENTS,
    TOKEN_COLUMNS,
    Order,
    segment_id,
)
from actcache.store.records import build
from actcache.store.stats import HookStats
from actcache.store.untrusted import MAX_JSON_BYTES as MAX_JSON_BYTES
from actcache.store.untrusted import parse_json as parse_json

MAX_ROWS = 1 << 24  # of a segment
MAX_CHUNK_BYTES = 1 << 30  # of an inner chunk: what a reader allocates at once
_MAX_METADATA = 1 << 20  # bytes of a zarr.json
_KEY = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON file of a store."""

    def vet(self) -> None:
        """Raise DamagedError unless the fields, read from disk, fit each other."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are cut and ordered. Fixed when the store is created."""

    context: int  # tokens the host sees at once
    segment_rows: int = 131_072  # rows of a full segment: the unit of work and of loss
    chunk_bytes: int = 1 << 20  # about one inner chunk
    unit_bytes: int = 8 << 20  # text bytes of one input unit, cut at parquet row groups
    order: Order = "permuted"

    def __post_init__(self) -> None:
        limits = {"segment_rows": MAX_ROWS, "chunk_bytes": MAX_CHUNK_BYTES}
        for name in ("context", "segment_rows", "chunk_bytes", "unit_bytes"):
            value, limit = getattr(self, name), limits.get(name)
            if value < 1:
                raise SettingsError(f"layout.{name}: expected at least 1, got {value}")
            if limit is not None and value > limit:
                raise SettingsError(f"layout.{name}: expected at most {limit:,}, got {value:,}")
        if self.segment_rows % self.context:
            raise SettingsError(
                f"layout.segment_rows={self.segment_rows} must be a multiple of "
                f"context={self.context}, so that no context straddles two segments"
            )


@dataclass(frozen=True, kw_only=True)
class Identity(Record):
    """store.json: what the rows are. Written once, never changed."""

    token_stream: dict[str, Any]  # data, tokenizer, packing
    host: dict[str, Any]  # model, revision, weights, dtype, attention
    layout: Layout
    token_stream_id: str
    store_id: str
    files: dict[str, Any] = field(default_factory=dict)  # other root files -> sha256
    recorded: dict[str, Any] = field(default_factory=dict)  # versions and the like, in no id
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def vet(self) -> None:
        if self.format != FORMAT:
            raise DamagedError(f"store.json has the format {self.format!r}, expected {FORMAT!r}")


@dataclass(frozen=True, kw_only=True)
class HookInfo:
    """One hook of a commit, without its statistics."""

    name: str  # canonical name, e.g. resid.2
    module: str  # module path inside the base model
    io: Literal["in", "out"]
    d: int
    dtype: str
    chunk_rows: int
    activation_id: str
    index: int | str | None = None  # tuple item or keyword
    norms: bool = False  # the length of each row is stored beside the rows

    def __post_init__(self) -> None:
        sane = self.dtype in DTYPES and 0 < self.d <= 1 << 24 and 0 < self.chunk_rows <= MAX_ROWS
        if not sane or self.chunk_bytes > MAX_CHUNK_BYTES:
            raise DamagedError(
                f"hook {self.name!r}: impossible dtype={self.dtype!r}, d={self.d} or "
                f"chunk_rows={self.chunk_rows}"
            )
        try:
            storage_key(self.name)
        except ValueError as e:
            raise DamagedError(str(e)) from None

    @property
    def key(self) -> str:
        return storage_key(self.name)

    @property
    def chunk_bytes(self) -> int:
        """Size of one inner chunk without its checksum."""
        return self.chunk_rows * self.d * DTYPES[self.dtype].itemsize

    def shard_bytes(self, rows: int) -> int:
        """Size of the file that holds `rows` rows: chunks and index, each with its crc32c."""
        return -(-rows // self.chunk_rows) * (self.chunk_bytes + 4 + 16) + 4

    @property
    def scales(self) -> HookInfo:
        """The array of the rows' scales, if this hook is int8: one float32 a row, cut alike."""
        return replace(self, d=1, dtype="float32")

    def files(self, rows: int) -> dict[str, int]:
        """Size of each data file of `rows` rows, by key in the segment's folder."""
        sizes = {f"acts/{self.key}/c/0/0": self.shard_bytes(rows)}
        if self.dtype == "int8":
            sizes[f"scales/{self.key}/c/0"] = self.scales.shard_bytes(rows)
            sizes[f"calibration/{self.key}/c/0/0"] = 2 * self.d * 4 + 4
        if self.norms:
            sizes[f"norms/{self.key}/c/0"] = rows * 4 + 4
        return sizes


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """What int8 storage has done to the rows of a commit, see int8.Error."""

    calibration: str  # sha256 of mean and std, float32
    fvu: float | None
    max_relative_error: float

    def vet(self) -> None:
        """As `Record.vet`."""
        if not _DIGEST.fullmatch(self.calibration):
            raise DamagedError(f"calibration {self.calibration!r:.80} is not a digest")
        if min(self.fvu or 0.0, self.max_relative_error) < 0:
            raise DamagedError("an error of storage is negative")


@dataclass(frozen=True, kw_only=True)
class CommittedHook:
    """A hook in one segment, with the statistics of its rows."""

    info: HookInfo
    plain: dict[str, Any]  # HookStats of rows without special tokens
    all: dict[str, Any]  # HookStats of every row
    int8: Quantised | None = None  # of a hook stored as int8

    def vet(self) -> None:
        """As `Record.vet`."""
        if (self.info.dtype == "int8") != (self.int8 is not None):
            raise DamagedError(f"hook {self.info.name!r}: int8 without its error, or not int8")
        if self.int8 is not None:
            self.int8.vet()

    def stats(self, special: bool = False) -> HookStats:
        return HookStats.from_json(self.all if special else self.plain, self.info.d)


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One file of a segment."""

    key: str  # path below the store
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key) or any(set(p) <= {"."} for p in self.key.split("/")):
            raise DamagedError(f"object key {self.key!r} is not allowed")
        if self.bytes < 0 or not _DIGEST.fullmatch(self.sha256):
            raise DamagedError(f"object {self.key!r} has a negative size or no sha256")


@dataclass(frozen=True, kw_only=True)
class Commit(Record):
    """commits/<segment>.<tag>.json: the only proof that rows exist."""

    segment: str
    folder: str  # the zarr group that holds the rows, segments/<segment>.<8 hex>
    unit: int
    index: int  # number of the segment inside its unit
    last_in_unit: bool
    rows: int
    documents: int  # documents that start in this segment
    token_digest: str
    hooks: tuple[CommittedHook, ...]
    objects: tuple[StoredObject, ...]
    writer: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not SEGMENT_ID.fullmatch(self.segment) or not (0 < self.rows <= MAX_ROWS):
            raise DamagedError(f"commit of {self.segment!r} with {self.rows} rows is impossible")
        if not re.fullmatch(rf"{SEGMENTS}/{re.escape(self.segment)}\.[0-9a-f]{{8}}", self.folder):
            raise DamagedError(f"commit of {self.segment!r} names the folder {self.folder!r}")
        if any(not o.key.startswith(f"{self.folder}/") for o in self.objects):
            raise DamagedError(f"commit of {self.segment!r} names objects outside {self.folder}")

    def vet(self) -> None:
        here = f"commit of {self.segment!r}"
        if min(self.unit, self.index) < 0 or segment_id(self.unit, self.index) != self.segment:
            raise DamagedError(f"{here} says it is segment {self.index} of unit {self.unit}")
        if not 0 <= self.documents <= self.rows or not _DIGEST.fullmatch(self.token_digest):
            raise DamagedError(f"{here} has {self.documents} documents or no token digest")
        vet_objects(here, self.folder, self.rows, [h.info for h in self.hooks], self.objects)
        for hook in self.hooks:
            hook.vet()

    @property
    def file(self) -> str:
        return f"{self.segment}.{tag(h.info.activation_id for h in self.hooks)}.json"


@dataclass(frozen=True, kw_only=True)
class SnapshotEntry:
    """One segment of a snapshot."""

    segment: str
    rows: int
    commits: dict[str, Any]  # commit file -> sha256

    def vet(self) -> None:
        """As `Record.vet`."""
        if not SEGMENT_ID.fullmatch(self.segment) or not 0 < self.rows <= MAX_ROWS:
            raise DamagedError(f"snapshot names {self.segment!r} with {self.rows} rows")
        name = re.compile(rf"{re.escape(self.segment)}\.[0-9a-f]{{12}}\.json")
        digests = [d for d in self.commits.values() if isinstance(d, str) and _DIGEST.fullmatch(d)]
        named = bool(self.commits) and all(map(name.fullmatch, self.commits))
        if not named or len(digests) != len(self.commits):
            raise DamagedError(
                f"snapshot names {list(self.commits)!r:.200} as commits of {self.segment}, or "
                "without their digests"
            )


@dataclass(frozen=True, kw_only=True)
class SnapshotRecord(Record):
    """snapshots/<n>.json: a frozen list of commits; what readers open."""

    name: str
    store_id: str
    rows: int
    hooks: tuple[str, ...]  # present in every segment
    segments: tuple[SnapshotEntry, ...]
    identity_sha256: str  # of store.json, so that the snapshot vouches for every record below it
    checksum: str = ""  # of this record with an empty checksum
    format_version: int = FORMAT_VERSION

    def sealed(self) -> SnapshotRecord:
        """The same record with its checksum filled in."""
        return replace(self, checksum=digest(asdict(replace(self, checksum=""))))

    def vet(self) -> None:
        for entry in self.segments:
            entry.vet()
        names = [entry.segment for entry in self.segments]
        if len(set(names)) != len(names) or len(set(self.hooks)) != len(self.hooks):
            raise DamagedError(f"snapshot {self.name!r:.40} names a segment or a hook twice")
        if self.rows != sum(entry.rows for entry in self.segments):
            raise DamagedError(f"snapshot {self.name!r:.40} has rows that are not its segments'")


def tag(activation_ids: Iterable[str]) -> str:
    """12 hex digits that name a set of hooks in file names."""
    return bytes_digest(canonical_json(sorted(activation_ids)))[7:19]


def vet_objects(
    here: str, folder: str, rows: int, hooks: Sequence[HookInfo], objects: Sequence[StoredObject]
) -> None:
    """Raise DamagedError unless `objects` are all the files of a group, each of its exact size.

    `here` names the record in the message. A file that is left out would never be verified.
    """
    if len({h.key for h in hooks}) != len(hooks):
        raise DamagedError(f"{here} has two hooks of one name")
    metadata = {"", "/tokens", "/acts", *(f"/tokens/{name}" for name in TOKEN_COLUMNS)}
    sizes = {f"{folder}/tokens/{n}/c/0": rows * t.itemsize + 4 for n, t in TOKEN_COLUMNS.items()}
    for key, size in (item for h in hooks for item in h.files(rows).items()):
        sizes[f"{folder}/{key}"] = size
        array = key.partition("/c/")[0]
        metadata |= {f"/{array}", f"/{array.partition('/')[0]}"}
    expected = sorted([*sizes, *(f"{folder}{part}/zarr.json" for part in metadata)])
    if sorted(o.key for o in objects) != expected:
        odd = {o.key for o in objects} ^ set(expected) or {"an object named twice"}
        raise DamagedError(f"{here} does not name exactly its files: {min(odd)}")
    for o in objects:
        limit = sizes.get(o.key)
        if (limit is not None and o.bytes != limit) or (limit is None and o.bytes > _MAX_METADATA):
            raise DamagedError(f"{here}: {o.key} cannot have {o.bytes:,} bytes with {rows:,} rows")


def dump(record: Any) -> bytes:
    """A record as indented JSON with a stable order."""
    return json.dumps(asdict(record), indent=1, sort_keys=True, allow_nan=False).encode()


def load(cls: type[T], data: bytes, path: object) -> T:
    """Parse `data` (read from `path`) as `cls`.

    Raises StoreVersionError for a newer format, DamagedError for anything malformed.
    """
    values = parse_json(data, path)
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamagedError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r:.40}")
    if version > FORMAT_VERSION:
        raise StoreVersionError(
            f"{path} has store format {version}; this actcache reads up to {FORMAT_VERSION}. "
            "Install a newer actcache to read it"
        )
    try:
        record = build(cls, values)
        if isinstance(record, Record):
            record.vet()
    except (SettingsError, DamagedError) as e:
        raise DamagedError(f"{path}: {str(e)[:1000]}") from None
    return record
