"""`actcache requantise`: a store's rows in a smaller type, without the host model.

The new store holds the same token tables, in the same segments and the same order, under the same
store id: it is what `actcache run layout.dtype=…` gives but for the rounding of the type it was
made from, which each commit names in `writer`. The calibration of int8 follows from the statistics
in the source's commits, those of the first segments, up to a million tokens without special ones,
so nothing is read twice.

Segment by segment, each committed whole: a process that dies loses one segment, the same command
continues, and several processes share the work by claims. Only smaller types are made: a wider one
would name a precision that the rows have lost.

Cost: one pass over the source; about three copies of the rows of one segment in memory.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.store import (
    DamagedError,
    HookInfo,
    HookStats,
    IdentityError,
    Segment,
    SettingsError,
    Snapshot,
    Store,
    StoreError,
    open_store,
)
from actcache.store.calibrations import publish_calibration
from actcache.store.canaries import canary_file, named_canary_files, read_canary, write_canary
from actcache.store.claims import Claims
from actcache.store.ids import activation_digest, bytes_digest
from actcache.store.int8 import CALIBRATION_ROWS, Calibration
from actcache.store.layout import CLAIMS, DTYPES, STORE_JSON, chunk_rows
from actcache.store.places import Location, address, place
from actcache.store.untrusted import MAX_JSON_BYTES, read_file
from actcache.store.writer import StoreWriter

POLL = 1.0  # seconds between looks at segments that others hold


@dataclass(frozen=True)
class Requantised:
    """What was done."""

    store: Store
    snapshot: str
    hooks: tuple[str, ...]
    written: int  # rows written now
    kept: int  # rows that were there already, or that others wrote


def requantise(
    source: Snapshot,
    target: str | Location,
    dtype: str = "int8",
    hooks: Sequence[str] | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Requantised:
    """Write the rows of `source` into the store at `target`, new or begun, as `dtype`.

    `hooks` None: all. `advance(rows)` is called as segments get done. Raises SettingsError for a
    type that is not smaller, IdentityError if `target` holds other work or another type,
    StoreError for values the type cannot hold, DamagedError, OutOfSpaceError.
    """
    names = [source.resolve_hook(h) for h in hooks] if hooks is not None else list(source.hooks)
    infos = {name: _smaller(source, name, dtype) for name in names}
    if not infos:
        raise SettingsError(f"{source.store.path}: there is no hook to requantise")
    writer = _open(source.store, place(target), infos)
    if dtype == "int8":
        _calibrate(source, infos, writer)
    work = _Work(source, infos, writer, advance)
    work.do()
    _copy_canaries(source, infos, writer)
    record = writer.snapshot([s.id for s in source.segments])
    kept = source.n_rows - work.written
    return Requantised(
        open_store(writer.path), record.name, tuple(record.hooks), work.written, kept
    )


# -- what to make ----------------------------------------------------------------------------------


def _smaller(source: Snapshot, name: str, dtype: str) -> HookInfo:
    """The hook as the new store has it."""
    info = source.hooks[name]
    if dtype not in DTYPES:
        raise SettingsError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    size = DTYPES[dtype].itemsize
    if size >= DTYPES[info.dtype].itemsize:
        raise SettingsError(
            f"dtype={dtype}: hook {name} of {source.store.path} is {info.dtype}, and only a "
            "smaller type can be made from it. actcache cp copies a store as it is"
        )
    layout = source.store.identity.layout
    return replace(
        info,
        dtype=dtype,
        chunk_rows=chunk_rows(info.d, size, layout.chunk_bytes, layout.segment_rows),
        activation_id=activation_digest(source.store_id, info.module, info.io, info.index, dtype),
        norms=True,
    )


def _open(source: Store, target: Location, infos: Mapping[str, HookInfo]) -> StoreWriter:
    """The new store, made if it is not there."""
    here, there = (f"{address(p)}/" for p in (source.path, target))
    if there.startswith(here) or here.startswith(there):
        raise StoreError(
            f"{target} and {source.path}: one lies in the other; choose another folder"
        )
    writer = StoreWriter(target, source.identity, dict(_root_files(source)))
    for commit in (c for some in writer.commits.values() for c in some):
        for held in (h.info for h in commit.hooks):
            asked = infos.get(held.name)
            if asked and asked.activation_id != held.activation_id:
                raise IdentityError(
                    f"hook {held.name}: {target} holds it as {held.dtype}, you asked for "
                    f"dtype={asked.dtype}. A store keeps one type per hook: choose another folder"
                )
    return writer


def _root_files(source: Store) -> list[tuple[str, bytes]]:
    """vocab.json and whatever else the identity vouches for."""
    found = []
    for name, sha256 in sorted(source.identity.files.items()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise DamagedError(f"{source.path}: {STORE_JSON} names the file {name!r:.80}")
        data = read_file(source.path, source.path / name, MAX_JSON_BYTES)
        if bytes_digest(data) != sha256:
            raise DamagedError(f"{source.path / name} does not match the digest in {STORE_JSON}")
        found.append((name, data))
    return found


def _calibrate(source: Snapshot, infos: Mapping[str, HookInfo], writer: StoreWriter) -> None:
    """Publish the calibrations that the new store lacks; all writers make the same."""
    for name, info in infos.items():
        if writer.calibration(info.activation_id) is not None:
            continue
        plain, every = HookStats.empty(info.d), HookStats.empty(info.d)
        for segment in source.segments:
            if plain.n >= CALIBRATION_ROWS:
                break
            plain = plain.merge(segment.stats(name))
            every = every.merge(segment.stats(name, special=True))
        seen = plain if plain.n else every
        publish_calibration(writer.path, info.activation_id, Calibration.of(seen), seen.n)


# -- doing it --------------------------------------------------------------------------------------


class _Work:
    """The segments of a snapshot on their way into another store."""

    def __init__(
        self,
        source: Snapshot,
        infos: Mapping[str, HookInfo],
        writer: StoreWriter,
        advance: Callable[[int], object],
    ) -> None:
        self.written = 0
        self._source, self._infos, self._writer = source, infos, writer
        self._advance = advance
        self._ids = {i.activation_id for i in infos.values()}
        self._done: set[str] = set()

    def do(self) -> None:
        """Write every segment that is not there and that nobody else is writing; wait for those."""
        with Claims(self._writer.path / CLAIMS, uuid.uuid4().hex[:8]) as claims:
            while self._walk(claims):
                time.sleep(POLL)

    def _walk(self, claims: Claims) -> bool:
        """True if others still hold some segments."""
        busy = False
        for segment in self._source.segments:
            if self._has(segment):
                continue
            if not claims.acquire(segment.id):
                busy = True
                continue
            self._writer.refresh()  # another may have done it since the last look
            if not self._has(segment):
                self._write(segment)
            claims.release(segment.id)
        self._writer.refresh()
        return busy

    def _has(self, segment: Segment) -> bool:
        there = self._writer.has(segment.id, self._ids)
        if there and segment.id not in self._done:
            self._done.add(segment.id)
            self._advance(segment.n_rows)
        return there

    def _write(self, segment: Segment) -> None:
        commit, tokens = segment.commits[0], segment.tokens()
        if tokens.digest() != commit.token_digest:
            raise DamagedError(f"tokens of {segment.id} differ from the committed digest")
        order = np.lexsort((tokens.pos, tokens.ctx))  # the writer permutes them again
        self._writer.write_segment(
            unit=commit.unit,
            index=commit.index,
            last_in_unit=commit.last_in_unit,
            tokens=tokens.take(order),
            acts=[
                (info, _cast(segment.acts(name).read()[order], info, segment.id))
                for name, info in self._infos.items()
            ],
            writer=self._provenance(segment),
        )
        self.written += segment.n_rows
        self._has(segment)

    def _provenance(self, segment: Segment) -> dict[str, Any]:
        """What the rows were made from, recorded in the commit."""
        origin = {
            name: {
                "dtype": segment.hooks[name].dtype,
                "activation_id": segment.hooks[name].activation_id,
            }
            for name in self._infos
        }
        return {"requantised_from": origin, "written_by": segment.commits[0].writer}


def _cast(rows: NDArray[Any], info: HookInfo, segment: str) -> NDArray[Any]:
    """Rows in a float type. int8 is made while writing."""
    if info.dtype == "int8":
        return rows
    with np.errstate(over="ignore"):
        cast: NDArray[Any] = rows.astype(DTYPES[info.dtype])
    if not np.isfinite(cast.astype(np.float32)).all():
        raise StoreError(
            f"hook {info.name}, segment {segment}: {info.dtype} cannot hold all values; try "
            "dtype=bfloat16 or dtype=int8"
        )
    return cast


def _copy_canaries(source: Snapshot, infos: Mapping[str, HookInfo], writer: StoreWriter) -> None:
    """The canaries of the hooks that were made, so that `verify --canary` works there too."""
    for file in named_canary_files(source):
        canary = read_canary(source.store, file)
        held = [h for h in canary.record.hooks if h.name in infos]
        ids = {infos[h.name].activation_id for h in held}
        if not held or canary_file(writer.path, ids).exists():
            continue
        write_canary(
            writer.path,
            store_id=canary.record.store_id,
            segment=canary.record.segment,
            contexts=canary.record.contexts,
            tokens=canary.tokens(),
            acts=[
                (replace(h, activation_id=infos[h.name].activation_id), canary.acts(h.name))
                for h in held
            ],
            writer=canary.record.writer,
        )
