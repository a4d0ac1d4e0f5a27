"""Write segments into a store: one owner per segment, commit last, never overwrite.

A segment's objects are published first, its commit record after them. A crash at any moment leaves
either a committed segment or loose objects that no commit names; the next writer removes those and
does the segment again. One writer holds the store at a time (an flock, released by the kernel when
the process dies).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actcache.store import layout
from actcache.store.encode import encode_acts, encode_group, encode_tokens
from actcache.store.errors import (
    DamagedError,
    IdentityError,
    StoreBusyError,
    StoreError,
)
from actcache.store.ids import bytes_digest, diff, file_digest
from actcache.store.publish import PARTIAL, publish
from actcache.store.reader import read_record
from actcache.store.schema import (
    Commit,
    CommittedHook,
    HookInfo,
    Identity,
    SnapshotEntry,
    SnapshotRecord,
    StoredObject,
    dump,
)
from actcache.store.stats import HookStats


class StoreWriter:
    """The single writer of a store. Use as a context manager."""

    def __init__(self, path: Path, identity: Identity, files: Mapping[str, bytes]) -> None:
        """Create the store at `path`, or open it if it holds exactly this identity.

        `files` are further root files (vocab.json); their digests are in `identity.files`.
        Raises IdentityError with a field-by-field diff, StoreBusyError if another writer runs,
        StoreError if the folder holds something else.
        """
        self.path = path.expanduser()
        self._lock = _lock(self.path)
        try:
            self._clear_partials()
            self.identity = self._open(identity, files)
            self.commits = self._read_commits()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store. Uncommitted objects stay for the next writer to clear."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- what is there ----------------------------------------------------------------------------

    def has(self, segment: str, activation_ids: set[str]) -> bool:
        """Whether a segment is committed with at least these hooks."""
        return activation_ids <= {
            h.info.activation_id for c in self.commits.get(segment, []) for h in c.hooks
        }

    def _open(self, identity: Identity, files: Mapping[str, bytes]) -> Identity:
        file = self.path / layout.STORE_JSON
        if not file.exists():
            ours = {layout.LOCK, layout.VOCAB_JSON}
            strangers = sorted(p.name for p in self.path.iterdir() if p.name not in ours)
            if strangers:
                raise StoreError(
                    f"{self.path} is not empty and is not a store; it holds {strangers[0]!r}. "
                    "Choose another folder with store=PATH"
                )
            for name, data in files.items():
                (self.path / name).unlink(missing_ok=True)  # from a run killed right here
                publish(self.path / name, data)
            publish(file, dump(identity))
        found = read_record(Identity, file)
        self._refuse_other(found, identity)
        return found

    def _refuse_other(self, found: Identity, asked: Identity) -> None:
        lines = [
            *diff(found.token_stream, asked.token_stream, "token_stream."),
            *diff(found.host, asked.host, "host."),
            *diff(vars(found.layout), vars(asked.layout), "layout."),
        ]
        if lines:
            raise IdentityError(
                f"{self.path} holds other work than you ask for:\n  "
                + "\n  ".join(lines)
                + "\nChoose another folder with store=PATH, or change the settings back"
            )
        if found.store_id != asked.store_id:
            raise DamagedError(
                f"{self.path / layout.STORE_JSON}: store_id does not match its own fields"
            )

    def _read_commits(self) -> dict[str, list[Commit]]:
        found: dict[str, list[Commit]] = {}
        for file in sorted((self.path / layout.COMMITS).glob("u*.json")):
            commit = read_record(Commit, file)
            found.setdefault(commit.segment, []).append(commit)
        return found

    # -- writing ----------------------------------------------------------------------------------

    def write_segment(
        self,
        *,
        unit: int,
        index: int,
        last_in_unit: bool,
        tokens: layout.TokenTable,
        acts: Sequence[tuple[HookInfo, NDArray[Any]]],
        writer: Mapping[str, Any],
    ) -> Commit:
        """Permute, encode, publish and commit one segment given in (ctx, pos) order.

        A segment that is committed already only gains the hooks it lacks, and only if its token
        table is the same. Raises OutOfSpaceError or StoreError; nothing is committed then.
        """
        segment = layout.segment_id(unit, index)
        acts = [(info, rows) for info, rows in acts if not self.has(segment, {info.activation_id})]
        self._clear_uncommitted(segment, [info for info, _ in acts])
        if self.identity.layout.order == "permuted":
            order = layout.permutation(segment, len(tokens))
            tokens = tokens.take(order)
            acts = [(info, rows[order]) for info, rows in acts]
        self._refuse_other_tokens(segment, tokens)
        objects = self._publish_objects(segment, tokens, acts)
        plain = (tokens.flags & layout.FLAG_SPECIAL) == 0
        commit = Commit(
            segment=segment,
            unit=unit,
            index=index,
            last_in_unit=last_in_unit,
            rows=len(tokens),
            documents=int(np.count_nonzero(tokens.flags & layout.FLAG_DOC_START)),
            token_digest=tokens.digest(),
            hooks=tuple(_committed(info, rows, plain) for info, rows in acts),
            objects=tuple(objects),
            writer=dict(writer),
        )
        publish(self.path / layout.COMMITS / commit.file, dump(commit))
        self.commits.setdefault(segment, []).append(commit)
        return commit

    def _publish_objects(
        self,
        segment: str,
        tokens: layout.TokenTable,
        acts: Sequence[tuple[HookInfo, NDArray[Any]]],
    ) -> list[StoredObject]:
        root = f"{layout.SEGMENTS}/{segment}"
        streams = [encode_acts(f"{root}/acts", rows, info) for info, rows in acts]
        if segment not in self.commits:
            streams = [
                encode_group(root),
                encode_group(f"{root}/tokens"),
                encode_tokens(f"{root}/tokens", tokens),
                encode_group(f"{root}/acts"),
                *streams,
            ]
        objects = []
        for key, data in (item for stream in streams for item in stream):
            publish(self.path / key, data)
            objects.append(StoredObject(key=key, bytes=len(data), sha256=bytes_digest(data)))
        return objects

    def _clear_partials(self) -> None:
        """Remove temporary files that a writer was killed over, outside of segments."""
        for folder in (self.path, self.path / layout.COMMITS, self.path / layout.SNAPSHOTS):
            for file in folder.glob(f".*{PARTIAL}"):
                file.unlink()

    def _clear_uncommitted(self, segment: str, hooks: Sequence[HookInfo]) -> None:
        """Remove what a writer that died left behind: no commit names it."""
        folder = self.path / layout.SEGMENTS / segment
        if segment in self.commits:
            for info in hooks:
                shutil.rmtree(folder / "acts" / info.key, ignore_errors=True)
        elif folder.exists():
            shutil.rmtree(folder)

    def _refuse_other_tokens(self, segment: str, tokens: layout.TokenTable) -> None:
        for commit in self.commits.get(segment, []):
            if commit.token_digest != tokens.digest():
                raise IdentityError(
                    f"segment {segment} of {self.path} holds other tokens than the data gives "
                    "now; hooks can only be added to the same tokens"
                )

    def snapshot(self, segments: Sequence[str]) -> SnapshotRecord:
        """Freeze the given segments, in this order, as the next snapshot; reuse an equal one."""
        entries = tuple(self._entry(s) for s in segments)
        hooks = [{h.info.name for c in self.commits[s] for h in c.hooks} for s in segments]
        names = sorted(set.intersection(*hooks)) if hooks else []
        newest = self._newest_snapshot()
        if newest and newest.segments == entries and newest.hooks == tuple(names):
            return newest
        record = SnapshotRecord(
            name=str(int(newest.name) + 1 if newest else 1),
            store_id=self.identity.store_id,
            rows=sum(e.rows for e in entries),
            hooks=tuple(names),
            segments=entries,
            identity_sha256=file_digest(self.path / layout.STORE_JSON),
        ).sealed()
        publish(self.path / layout.SNAPSHOTS / f"{record.name}.json", dump(record))
        return record

    def _entry(self, segment: str) -> SnapshotEntry:
        commits = self.commits[segment]
        files = {c.file: file_digest(self.path / layout.COMMITS / c.file) for c in commits}
        return SnapshotEntry(segment=segment, rows=commits[0].rows, commits=files)

    def _newest_snapshot(self) -> SnapshotRecord | None:
        files = sorted(
            (self.path / layout.SNAPSHOTS).glob("[0-9]*.json"), key=lambda p: int(p.stem)
        )
        return read_record(SnapshotRecord, files[-1]) if files else None


def _committed(info: HookInfo, rows: NDArray[Any], plain: NDArray[np.bool_]) -> CommittedHook:
    some = HookStats.of(rows[plain])
    rest = HookStats.of(rows[~plain])
    return CommittedHook(info=info, plain=some.to_json(), all=some.merge(rest).to_json())


def _lock(root: Path) -> int:
    """Hold the store, or StoreBusyError. Returns the descriptor that holds it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root / layout.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise StoreError(f"store={root}: cannot write there: {e.strerror}") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 200, 0).decode(errors="replace").strip()
        os.close(fd)
        raise StoreBusyError(
            f"{root} is being written by another actcache run ({owner or 'unknown process'}). "
            "Wait for it to end, or choose another folder with store=PATH"
        ) from None
    os.truncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": os.getpid()}).encode(), 0)
    return fd
