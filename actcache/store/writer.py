"""Write segments into a store: any number of writers, commit last, never overwrite.

Each attempt at a segment has a folder of its own, so no two writers ever touch the same file. Its
objects are published first, its commit record after them, exclusively: of two writers that did the
same segment one commits, the other finds that out and removes its own folder. A crash leaves a
committed segment, or a folder that no commit names, which `collect` removes later.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.store import layout
from actcache.store.calibrations import find_calibration
from actcache.store.encode import (
    encode_acts,
    encode_group,
    encode_int8,
    encode_norms,
    encode_tokens,
)
from actcache.store.errors import DamagedError, IdentityError, StoreError
from actcache.store.files import remove
from actcache.store.ids import bytes_digest, diff, file_digest
from actcache.store.int8 import Calibration, Int8Rows, store_rows
from actcache.store.places import Location, Remote, each, place, refuse_unwritable
from actcache.store.publish import PARTIAL, publish, sync_folders
from actcache.store.reader import commit_files, read_record, snapshot_numbers
from actcache.store.schema import (
    Commit,
    CommittedHook,
    HookInfo,
    Identity,
    Quantised,
    SnapshotEntry,
    SnapshotRecord,
    StoredObject,
    dump,
)
from actcache.store.stats import HookStats
from actcache.store.untrusted import inside


class StoreWriter:
    """A writer of a store. Others may write at the same time."""

    def __init__(
        self, path: str | Location, identity: Identity, files: Mapping[str, bytes]
    ) -> None:
        """Create the store at `path`, or open it if it holds exactly this identity.

        `path` is a folder or s3://bucket/prefix. `files` are further root files (vocab.json); their
        digests are in `identity.files`.
        Raises IdentityError with a field-by-field diff, StoreError if the folder holds something
        else or cannot be written.
        """
        self.path = place(path)
        refuse_unwritable(self.path)
        self._create(identity, files)
        for name in layout.FOLDERS:
            inside(self.path, self.path / name)
        self.identity = read_record(Identity, self.path, self.path / layout.STORE_JSON)
        self._refuse_other(identity)
        self.commits: dict[str, list[Commit]] = {}
        self._known: set[str] = set()
        self._calibrations: dict[str, Calibration] = {}
        self.refresh()

    # -- what is there ----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Learn of commits that other writers have made."""
        new = [file for file in commit_files(self.path) if file.name not in self._known]
        for commit in each(self.path, lambda file: read_record(Commit, self.path, file), new):
            self._add(commit)

    def _add(self, commit: Commit) -> None:
        if commit.file not in self._known:
            self._known.add(commit.file)
            self.commits.setdefault(commit.segment, []).append(commit)

    def has(self, segment: str, activation_ids: set[str]) -> bool:
        """Whether a segment is committed with at least these hooks."""
        return activation_ids <= {
            h.info.activation_id for c in self.commits.get(segment, []) for h in c.hooks
        }

    def _create(self, identity: Identity, files: Mapping[str, bytes]) -> None:
        file = self.path / layout.STORE_JSON
        if file.exists():
            return
        try:
            if isinstance(self.path, Path):
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StoreError(f"store={self.path}: cannot write there: {e.strerror}") from e
        refuse_strangers(self.path)
        for name, data in files.items():
            _publish_once(self.path / name, data)
        _publish_once(file, dump(identity))

    def _refuse_other(self, asked: Identity) -> None:
        found = self.identity
        lines = identity_diff(found, asked)
        if lines:
            raise IdentityError(
                f"{self.path} holds other work than you ask for:\n  "
                + "\n  ".join(lines)
                + "\nChoose another folder with store=PATH, or change the settings back"
            )
        if found.store_id != asked.store_id:
            file = self.path / layout.STORE_JSON
            raise DamagedError(f"{file}: store_id does not follow from its fields")

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
        table is the same. Returns the commit that counts, another writer's if it was first.
        Raises OutOfSpaceError or StoreError; nothing is committed then.
        """
        segment = layout.segment_id(unit, index)
        acts = [(info, rows) for info, rows in acts if not self.has(segment, {info.activation_id})]
        if self.identity.layout.order == "permuted":
            order = layout.permutation(segment, len(tokens))
            tokens = tokens.take(order)
            acts = [(info, rows[order]) for info, rows in acts]
        self._refuse_other_tokens(segment, tokens)
        folder = f"{layout.SEGMENTS}/{segment}.{uuid.uuid4().hex[:8]}"
        plain = (tokens.flags & layout.FLAG_SPECIAL) == 0
        hooks = [_stored(info, rows, plain, self._calibration(info)) for info, rows in acts]
        parts = [(hook.info, rows) for hook, rows in hooks]
        commit = Commit(
            segment=segment,
            folder=folder,
            unit=unit,
            index=index,
            last_in_unit=last_in_unit,
            rows=len(tokens),
            documents=int(np.count_nonzero(tokens.flags & layout.FLAG_DOC_START)),
            token_digest=tokens.digest(),
            hooks=tuple(hook for hook, _ in hooks),
            objects=tuple(publish_group(self.path, folder, tokens, parts)),
            writer=dict(writer),
        )
        return self._commit(commit)

    def calibration(self, activation_id: str) -> Calibration | None:
        """The calibration of a hook stored as int8; None while nobody has made it."""
        if activation_id not in self._calibrations:
            found = find_calibration(self.path, activation_id, self.commits)
            if found is None:
                return None
            self._calibrations[activation_id] = found
        return self._calibrations[activation_id]

    def _calibration(self, info: HookInfo) -> Calibration | None:
        if info.dtype != "int8":
            return None
        found = self.calibration(info.activation_id)
        if found is None:
            raise StoreError(f"hook {info.name} of {self.path} is int8 and has no calibration yet")
        return found

    def _commit(self, commit: Commit) -> Commit:
        """Publish the record; if another writer did the same work first, ours is removed."""
        file = self.path / layout.COMMITS / commit.file
        try:
            publish(file, dump(commit))
        except FileExistsError:
            remove(self.path / commit.folder)
            commit = read_record(Commit, self.path, file)
        self._add(commit)
        return commit

    def _refuse_other_tokens(self, segment: str, tokens: layout.TokenTable) -> None:
        for commit in self.commits.get(segment, []):
            if commit.token_digest != tokens.digest():
                raise IdentityError(
                    f"segment {segment} of {self.path} holds other tokens than the data gives "
                    "now; hooks can only be added to the same tokens"
                )

    # -- snapshots --------------------------------------------------------------------------------

    def snapshot(self, segments: Sequence[str]) -> SnapshotRecord:
        """Freeze the given segments, in this order, as the next snapshot; reuse an equal one."""
        entries = tuple(each(self.path, self._entry, segments))
        hooks = [{h.info.name for c in self.commits[s] for h in c.hooks} for s in segments]
        names = tuple(sorted(set.intersection(*hooks))) if hooks else ()
        while True:
            newest = self._newest_snapshot()
            if newest and (newest.segments, newest.hooks) == (entries, names):
                return newest
            record = SnapshotRecord(
                name=str(int(newest.name) + 1 if newest else 1),
                store_id=self.identity.store_id,
                rows=sum(e.rows for e in entries),
                hooks=names,
                segments=entries,
                identity_sha256=file_digest(self.path / layout.STORE_JSON),
            ).sealed()
            try:
                publish(self.path / layout.SNAPSHOTS / f"{record.name}.json", dump(record))
            except FileExistsError:
                continue  # another writer took this number
            return record

    def _entry(self, segment: str) -> SnapshotEntry:
        commits = self.commits[segment]
        files = {c.file: file_digest(self.path / layout.COMMITS / c.file) for c in commits}
        return SnapshotEntry(segment=segment, rows=commits[0].rows, commits=files)

    def _newest_snapshot(self) -> SnapshotRecord | None:
        numbers = snapshot_numbers(self.path)
        if not numbers:
            return None
        file = self.path / layout.SNAPSHOTS / f"{numbers[-1]}.json"
        return read_record(SnapshotRecord, self.path, file)


def identity_diff(found: Identity, asked: Identity) -> list[str]:
    """Lines for every field in which two identities differ; empty for the same work."""
    return [
        *diff(found.token_stream, asked.token_stream, "token_stream."),
        *diff(found.host, asked.host, "host."),
        *diff(vars(found.layout), vars(asked.layout), "layout."),
    ]


def refuse_strangers(path: Location) -> None:
    """StoreError if a folder without store.json holds anything but what a dead run left there."""
    ours = (layout.VOCAB_JSON, layout.STORE_JSON)
    if isinstance(path, Remote):
        names = path.names()
    else:
        names = [p.name for p in path.iterdir()] if path.is_dir() else []
    strangers = [n for n in names if n not in ours and not n.endswith(PARTIAL)]
    if strangers:
        raise StoreError(
            f"{path} is not empty and is not a store; it holds {min(strangers)!r}. "
            "Choose another folder with store=PATH"
        )


def publish_group(
    root: Location,
    folder: str,
    tokens: layout.TokenTable,
    acts: Sequence[tuple[HookInfo, NDArray[Any] | Int8Rows]],
) -> list[StoredObject]:
    """Publish a token table and hooks as the zarr group `folder` of the store at `root`.

    All of it is durable when this returns: a commit may name it then, and not before.
    """
    parts = ["acts"]
    if any(isinstance(rows, Int8Rows) for _, rows in acts):
        parts += ["scales", "calibration"]
    if any(info.norms for info, _ in acts):
        parts += ["norms"]
    streams = [
        encode_group(folder),
        encode_group(f"{folder}/tokens"),
        encode_tokens(f"{folder}/tokens", tokens),
        *(encode_group(f"{folder}/{part}") for part in parts),
        *(
            encode_int8(folder, rows, info)
            if isinstance(rows, Int8Rows)
            else encode_acts(f"{folder}/acts", rows, info)
            for info, rows in acts
        ),
        *(encode_norms(folder, rows, info) for info, rows in acts if info.norms),
    ]
    objects, folders = [], set[Path]()
    for key, data in (item for stream in streams for item in stream):
        publish(root / key, data, folders)
        objects.append(StoredObject(key=key, bytes=len(data), sha256=bytes_digest(data)))
    if isinstance(root, Path):
        sync_folders(folders, root)
    return objects


def _publish_once(path: Location, data: bytes) -> None:
    """Publish, or leave what another writer has published under the name."""
    try:
        publish(path, data)
    except FileExistsError:
        return


def _stored(
    info: HookInfo,
    rows: NDArray[Any],
    plain: NDArray[np.bool_],
    calibration: Calibration | None,
) -> tuple[CommittedHook, NDArray[Any] | Int8Rows]:
    """Record and content of a hook; statistics are those of the rows that readers get."""
    if calibration is None:
        some, rest = (HookStats.of(rows, np.flatnonzero(which)) for which in (plain, ~plain))
        both = some.merge(rest).to_json()
        return CommittedHook(info=info, plain=some.to_json(), all=both), rows
    stored, some, rest, error = store_rows(rows, calibration, plain)
    quantised = Quantised(
        calibration=calibration.digest,
        fvu=error.fvu,
        max_relative_error=error.max_relative_error,
    )
    both = some.merge(rest).to_json()
    return CommittedHook(info=info, plain=some.to_json(), all=both, int8=quantised), stored
