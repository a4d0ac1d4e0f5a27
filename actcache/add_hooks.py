"""`actcache add-hooks`: further hooks of the tokens that a store holds, without its data set.

The token tables are the data: rows sorted by (ctx, pos) are the contexts that the host saw, special
tokens included, and document borders are flagged, so the host can be given exactly the same again.
Contexts run in the same batches as in `actcache run`, so on one machine the rows are the bits that
capturing everything at once would have given. Several processes share the work by the claims on
units that `run` uses; what is committed is not computed again.

Cost: one forward pass over the store's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from tqdm import tqdm

from actcache import canary, ranks, sharded
from actcache.calibrate import calibrate
from actcache.canary import contexts_of
from actcache.capture import LazyCapture
from actcache.data import Packing
from actcache.errors import DataError
from actcache.fill import WriteBehind
from actcache.hooks import resolve
from actcache.host import Host, HostSettings
from actcache.run import register, resolved_host
from actcache.store import (
    DamagedError,
    IdentityError,
    Segment,
    SettingsError,
    Snapshot,
    Store,
    open_store,
)
from actcache.store.claims import Claims
from actcache.store.ids import diff
from actcache.store.layout import StorageType
from actcache.store.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class AddHooksSettings:
    """Everything `actcache add-hooks` takes."""

    host: HostSettings
    store: str | None  # folder of the store; None is refused
    hooks: tuple[str, ...] | str = "resid"
    layers: tuple[int, ...] | None = None  # for hooks without a layer; None: all
    dtype: StorageType | None = None  # None: as the store's hooks
    catalog: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.store:
            raise SettingsError("name the store: actcache add-hooks STORE host=… hooks=…")


@dataclass(frozen=True, kw_only=True)
class Added:
    """What was added."""

    store: Store
    snapshot: str
    hooks: tuple[str, ...]  # all that the snapshot has now
    tokens: int  # rows of the snapshot
    computed: int  # rows that went through the host now
    seconds: float
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"store": str(self.store.path)}

    def __str__(self) -> str:
        if self.interrupted:
            return "interrupted: all that is committed is kept; the same command continues"
        if not self.computed:
            return (
                f"nothing to compute: snapshot {self.snapshot} of {self.store.path} holds "
                f"{', '.join(self.hooks)}; no model loaded"
            )
        return (
            f"{self.store.path}: snapshot {self.snapshot} holds {self.tokens:,} tokens of "
            f"{', '.join(self.hooks)}; {self.computed:,} computed now in {self.seconds:.0f} s"
        )


def add_hooks(settings: AddHooksSettings, say: Callable[[str], None] = lambda _: None) -> Added:
    """Capture `settings.hooks` for every segment of the store's newest snapshot.

    Raises IdentityError with a field-by-field diff if the host is not the store's, and as
    `actcache.run.run` does for hooks. Ctrl-C keeps what is committed and sets `interrupted`.
    Several ranks share the work as in `run`.
    """
    sharded.check_launch(settings.host.sharding)
    with ranks.joined(settings.host.rank_timeout) as group:
        shown = settings.progress and group.first
        return _add_hooks(replace(settings, progress=shown), group.say(say), group)


def _add_hooks(settings: AddHooksSettings, say: Callable[[str], None], group: ranks.Ranks) -> Added:
    started = time.perf_counter()
    store = open_store(str(settings.store))
    _refuse_images(store)
    snapshot = store.snapshot()
    host = Host(group.one_by_one(lambda: resolved_host(settings.host, settings.progress, say)))
    _refuse_other_host(store, host)
    points = resolve(settings.hooks, settings.layers, host.skeleton())
    say(f"hooks: {', '.join(p.name for p in points)}")
    dtype = settings.dtype or _common_dtype(snapshot)
    writer = StoreWriter(store.path, store.identity, {})
    capture = LazyCapture(host, points, _packing(store), store.identity, dtype, say)
    capture.refuse_other_types(writer)
    replay = _Replay(writer, capture, settings.progress)
    while True:
        interrupted = replay.fill(snapshot)
        newest = store.snapshot(group.from_first("its snapshot", lambda: store.snapshot().name))
        if interrupted or newest.record.segments == snapshot.record.segments:
            break
        snapshot = newest  # it has grown meanwhile
    group.add("computed", replay.written.computed)
    group.meet("come to the end of the run")
    computed = group.add("computed", 0)
    if not interrupted:
        if group.first:
            writer.refresh()
            writer.snapshot([s.id for s in snapshot.segments])
        group.meet("take the snapshot")
        snapshot = store.snapshot()
        if group.first:
            register(snapshot, settings.catalog, say)
    return Added(
        store=store,
        snapshot=snapshot.name,
        hooks=tuple(sorted(snapshot.hooks)),
        tokens=snapshot.n_rows,
        computed=computed,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )


class _Replay:
    """Fills the segments of a snapshot with the hooks of `capture`."""

    def __init__(self, writer: StoreWriter, capture: LazyCapture, progress: bool) -> None:
        self._writer, self._capture, self._progress = writer, capture, progress
        self.written = WriteBehind(writer, capture)

    def fill(self, snapshot: Snapshot) -> bool:
        """Commit what is missing; True if Ctrl-C ended it."""
        units = [list(g) for _, g in groupby(snapshot.segments, lambda s: s.commits[0].unit)]
        with tqdm(
            total=snapshot.n_rows,
            unit="tok",
            unit_scale=True,
            desc="adding hooks",
            disable=not self._progress,
        ) as bar:
            done = (s.n_rows for s in snapshot.segments if self._done(s))
            advance = ranks.current().counting(bar, sum(done))
            walk = partial(self._walk, units, bar=bar, advance=advance)
            return self.written.share(walk, lambda: advance(0))

    def _walk(
        self,
        units: list[list[Segment]],
        claims: Claims,
        bar: Any,
        advance: Callable[[int], object],
    ) -> bool:
        """Do every free unit; True if others still hold some that lack hooks."""
        busy = False
        known = ((s.id, list(contexts_of(s.tokens()).values())) for unit in units for s in unit)
        if not calibrate(self._capture, self._writer, known, claims, self._progress):
            return True
        for segments in units:
            if not all(map(self._done, segments)):
                name = f"u{segments[0].commits[0].unit:05d}"
                if claims.acquire(name):
                    self._writer.refresh()
                    for segment in (s for s in segments if not self._done(s)):
                        self._fill_segment(segment, advance)
                    self.written.settle()
                    claims.release(name)
                    if self._done(units[0][0]):
                        canary.write(self._writer, units[0][0].id, self._capture)
                else:
                    busy = True
            self._writer.refresh()
        bar.n = sum(s.n_rows for unit in units for s in unit if self._done(s))
        bar.refresh()
        return busy

    def _done(self, segment: Segment) -> bool:
        return self._writer.has(segment.id, self._capture.activation_ids)

    def _fill_segment(self, segment: Segment, advance: Callable[[int], object]) -> None:
        commit = segment.commits[0]
        tokens = segment.tokens()
        if tokens.digest() != commit.token_digest:
            raise DamagedError(f"tokens of {segment.id} differ from the committed digest")
        self.written.add(
            list(contexts_of(tokens).values()),
            advance,
            unit=commit.unit,
            index=commit.index,
            last_in_unit=commit.last_in_unit,
        )


def _packing(store: Store) -> Packing:
    """The packing that the store's tokens went through."""
    recorded = store.identity.token_stream["packing"]
    return Packing(
        context=recorded["context"],
        eos=recorded["separator"],
        bos=recorded["bos"],
        attend_across_documents=recorded["attend_across_documents"],
        drop_tail=recorded["drop_tail"],
        special=frozenset(store.identity.recorded.get("special_token_ids", ())),
    )


def _refuse_images(store: Store) -> None:
    """DataError for a store whose tokens alone are not what the host saw."""
    if store.identity.token_stream["packing"].get("images") is not None:
        raise DataError(
            f"{store.path} was made from images, and a store keeps token ids but no pixels. Its "
            "data set is needed: actcache run with the same host=…, data=… and store=…, and the "
            "further hooks, adds them to the same rows"
        )


def _refuse_other_host(store: Store, host: Host) -> None:
    asked = host.identity | {"order": store.identity.layout.order}
    lines = list(diff(store.identity.host, asked, "host."))
    if lines:
        lines.insert(0, f"{store.path} was made by another host than host.model={host.folder}:")
        raise IdentityError("\n  ".join(lines))


def _common_dtype(snapshot: Snapshot) -> str:
    """The storage type of the store's hooks. SettingsError if there are several."""
    dtypes = sorted({h.dtype for h in snapshot.hooks.values()})
    if len(dtypes) != 1:
        raise SettingsError(
            f"the hooks of {snapshot.store.path} are stored as {' and '.join(dtypes)}: say which "
            "with layout.dtype=…"
        )
    return dtypes[0]
