"""The JSON records of a store: identity, commits, snapshots. Read strictly, sizes checked first.

Stores come from other teams, so every record is untrusted: bounded in size, NaN refused, unknown
keys refused, names matched against patterns before they touch a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from actcache.store.errors import DamagedError, SettingsError, StoreVersionError
from actcache.store.hooknames import storage_key
from actcache.store.ids import bytes_digest, canonical_json, digest
from actcache.store.layout import DTYPES, FORMAT, FORMAT_VERSION, SEGMENT_ID, SEGMENTS, Order
from actcache.store.records import build
from actcache.store.stats import HookStats

MAX_JSON_BYTES = 256 << 20
_KEY = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are cut and ordered. Fixed when the store is created."""

    context: int  # tokens the host sees at once
    segment_rows: int = 131_072  # rows of a full segment: the unit of work and of loss
    chunk_bytes: int = 1 << 20  # about one inner chunk
    unit_bytes: int = 8 << 20  # text bytes of one input unit, cut at parquet row groups
    order: Order = "permuted"

    def __post_init__(self) -> None:
        for name in ("context", "segment_rows", "chunk_bytes", "unit_bytes"):
            if getattr(self, name) < 1:
                raise SettingsError(
                    f"layout.{name}: expected at least 1, got {getattr(self, name)}"
                )
        if self.segment_rows % self.context:
            raise SettingsError(
                f"layout.segment_rows={self.segment_rows} must be a multiple of "
                f"context={self.context}, so that no context straddles two segments"
            )


@dataclass(frozen=True, kw_only=True)
class Identity:
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

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or not (0 < self.d <= 1 << 24) or self.chunk_rows < 1:
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


@dataclass(frozen=True, kw_only=True)
class CommittedHook:
    """A hook in one segment, with the statistics of its rows."""

    info: HookInfo
    plain: dict[str, Any]  # HookStats of rows without special tokens
    all: dict[str, Any]  # HookStats of every row

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
        if self.bytes < 0:
            raise DamagedError(f"object {self.key!r} has negative size")


@dataclass(frozen=True, kw_only=True)
class Commit:
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
        if not SEGMENT_ID.fullmatch(self.segment) or not (0 < self.rows <= 1 << 32):
            raise DamagedError(f"commit of {self.segment!r} with {self.rows} rows is impossible")
        if not re.fullmatch(rf"{SEGMENTS}/{re.escape(self.segment)}\.[0-9a-f]{{8}}", self.folder):
            raise DamagedError(f"commit of {self.segment!r} names the folder {self.folder!r}")
        if any(not o.key.startswith(f"{self.folder}/") for o in self.objects):
            raise DamagedError(f"commit of {self.segment!r} names objects outside {self.folder}")

    @property
    def file(self) -> str:
        names = sorted(h.info.activation_id for h in self.hooks)
        return f"{self.segment}.{bytes_digest(canonical_json(names))[7:19]}.json"


@dataclass(frozen=True, kw_only=True)
class SnapshotEntry:
    """One segment of a snapshot."""

    segment: str
    rows: int
    commits: dict[str, Any]  # commit file -> sha256


@dataclass(frozen=True, kw_only=True)
class SnapshotRecord:
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


def dump(record: Any) -> bytes:
    """A record as indented JSON with a stable order."""
    return json.dumps(asdict(record), indent=1, sort_keys=True, allow_nan=False).encode()


def load(cls: type[T], data: bytes, path: Path) -> T:
    """Parse `data` (read from `path`) as `cls`.

    Raises StoreVersionError for a newer format, DamagedError for anything malformed.
    """
    record = parse_json(data, path)
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreVersionError(
            f"{path} has store format {version}; this actcache reads up to {FORMAT_VERSION}. "
            "Install a newer actcache to read it"
        )
    try:
        return build(cls, record)
    except SettingsError as e:
        raise DamagedError(f"{path}: {e}") from None


def parse_json(data: bytes, path: Path) -> Mapping[str, Any]:
    """A JSON object, no larger than MAX_JSON_BYTES and free of NaN, or DamagedError."""
    if len(data) > MAX_JSON_BYTES:
        raise DamagedError(f"{path}: {len(data):,} bytes of JSON is more than any store needs")
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise DamagedError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: expected a JSON object")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not allowed")
