"""Segments as `actcache run` would store them, captured when they are asked for; nothing on disk.

The same input in the same order, cut into the same segments, through the same forward passes,
rounded to the storage type, in the same row order: whoever reads them cannot tell them from a
store's, but for the time it takes. What `saetrain source=live` trains on.

Cost: the host in memory beside the SAE, and a forward pass for every row, every time. Walks that
run at once (training read ahead, an evaluation) take turns, segment by segment. int8 is left to
stores: its calibration belongs to one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from actcache.capture import LazyCapture
from actcache.data import Context
from actcache.errors import HookError
from actcache.order import InputOrder, Place
from actcache.run import CacheSettings, prepare
from actcache.segments import token_table
from actcache.store import HookInfo, SettingsError, TokenTable
from actcache.store.layout import permutation
from actcache.store.records import build

Wanted = Callable[[NDArray[np.uint8], NDArray[np.uint64]], NDArray[np.bool_]]
GROUPS = ("host", "data", "layout")


@dataclass(frozen=True)
class LiveSegment:
    """Rows of one segment in stored order, those of whole forward passes that had a wanted row."""

    id: str
    place: dict[str, int]  # to go on from here: `segments(start=place)`
    row: NDArray[np.int64]  # (n,) number in the whole segment, ascending
    tokens: TokenTable  # of these rows
    acts: dict[str, NDArray[Any]]  # hook -> (n, d) in storage type


class LiveCapture:
    """A host, its input, and the hooks that are wanted of it."""

    def __init__(self, settings: CacheSettings, say: Callable[[str], None]) -> None:
        """Reads the digests of data and weights; the model is loaded with the first segment.

        Raises ActcacheError subclasses as `actcache.run.prepare`.
        """
        if settings.host.sharding != "none":
            raise SettingsError(
                f"host.sharding={settings.host.sharding}: a live source has the whole host on one "
                "process. Make a store with torchrun … actcache run, and train from it"
            )
        if settings.layout.dtype == "int8":
            raise SettingsError(
                "layout.dtype=int8: its calibration belongs to a store. Use bfloat16 with a live "
                "source, or make a store"
            )
        self._work = work = prepare(settings, say)
        self._capture = LazyCapture(
            work.host, work.points, work.packing, work.identity, settings.layout.dtype, say
        )
        self.names = {  # as the user wrote them -> as stored
            asked: point.name for asked, point in zip(_asked(settings), work.points, strict=False)
        }
        if len(self.names) != len(work.points):
            raise HookError(
                f"hooks={list(_asked(settings))}: expected one place for each, such as resid.2; "
                f"they stand for {', '.join(p.name for p in work.points)}"
            )
        self._turn = threading.Lock()
        self._kept: dict[str, LiveSegment] = {}

    @property
    def hooks(self) -> Mapping[str, HookInfo]:
        """What a store would record of each hook, by name. Loads the host."""
        with self._turn:
            return {info.name: info for info in self._capture.infos}

    @property
    def context(self) -> int:
        """Tokens of a context."""
        return self._work.packing.context

    def ids(self) -> dict[str, Any]:
        """The ids that a store of these settings has."""
        identity = self._work.identity
        return {
            "store_id": identity.store_id,
            "token_stream_id": identity.token_stream_id,
            "activation_ids": self._work.hook_ids,
        }

    def segments(
        self,
        start: Mapping[str, int] | None = None,
        wanted: Wanted | None = None,
        stop: threading.Event | None = None,
        keep_bytes: int = 0,
    ) -> Iterator[LiveSegment]:
        """The segments of the plan from `start` on, until the data or the budget ends.

        `wanted(flags, doc)` says which rows matter: forward passes without any are left out.
        `stop` ends the walk within a forward pass. The first segments that fit `keep_bytes` stay
        in memory for the next walk that comes to them (not with `wanted`). Raises NonFiniteError,
        DataError.
        """
        place = None if start is None else Place(**start)
        work, room = self._work, keep_bytes
        order = InputOrder(
            work.settings, work.source, work.packing, self._capture.tokenizer, work.identity
        )
        planned = order.segments(place)
        while True:
            with self._turn:
                step = next(planned, None)
                if step is None or (stop is not None and stop.is_set()):
                    return
                name, contexts, here = step
                found = None if keep_bytes else self._kept.pop(name, None)
                if found is None:
                    found = self._segment(name, contexts, here, wanted, stop)
                if found is None:
                    return
            room -= sum(x.nbytes for x in found.acts.values())
            if keep_bytes and wanted is None and room >= 0:
                self._kept[name] = found
            yield found

    def _segment(
        self,
        name: str,
        contexts: list[Context],
        place: Place,
        wanted: Wanted | None,
        stop: threading.Event | None,
    ) -> LiveSegment | None:
        """None if `stop` was set meanwhile."""
        table = token_table(contexts)
        builder, first = self._capture.builder, 0
        made = np.zeros(len(table), dtype=np.bool_)
        parts: list[dict[str, NDArray[Any]]] = []
        for at in range(0, len(contexts), builder.batch_contexts):
            batch = contexts[at : at + builder.batch_contexts]
            rows = slice(first, first + sum(map(len, batch)))
            first = rows.stop
            if stop is not None and stop.is_set():
                return None
            if wanted is None or wanted(table.flags[rows], table.doc[rows]).any():
                made[rows] = True
                parts.append(builder.build(batch, lambda _: None)[1])
        return self._stored(name, place, table, made, parts)

    def _stored(
        self,
        name: str,
        place: Place,
        table: TokenTable,
        made: NDArray[np.bool_],
        parts: Sequence[Mapping[str, NDArray[Any]]],
    ) -> LiveSegment:
        """The rows in the order of a store; `made` says which of the table were captured."""
        stored = np.arange(len(table))
        if self._work.identity.layout.order == "permuted":
            stored = permutation(name, len(table))
        row = np.flatnonzero(made[stored])
        compact = (np.cumsum(made) - 1)[stored[row]]
        acts = {
            info.name: np.concatenate([p[info.name] for p in parts])[compact]
            if parts
            else np.empty((0, info.d), dtype=np.float32)
            for info in self._capture.infos
        }
        return LiveSegment(name, asdict(place), row, table.take(stored[row]), acts)


def open_live(
    values: Mapping[str, Any], hooks: Sequence[str], say: Callable[[str], None]
) -> LiveCapture:
    """The capture of `hooks` for settings as plain mappings: `host`, `data`, `tokens`, ….

    `host`, `data` and `layout` may be the names of files in conf/. Raises SettingsError for keys
    that are unknown, and for those that only a store needs.
    """
    needless = {"store", "part", "catalog", "hooks", "layers", "progress"} & set(values)
    if needless:
        raise SettingsError(f"live.{min(needless)} has no effect: nothing is stored; remove it")
    chosen = {k: _preset(k, v) if k in GROUPS else v for k, v in values.items() if v is not None}
    chosen |= {"hooks": tuple(dict.fromkeys(hooks)), "progress": False}
    return LiveCapture(build(CacheSettings, chosen, "live"), say)


def _preset(group: str, value: Any) -> Any:
    """The mapping that a name stands for, alone or as `{preset: NAME, key: value}`."""
    given = {"preset": value} if isinstance(value, str) else dict(value)
    name = given.pop("preset", None)
    if name is None:
        return given
    return {k: v for k, v in (_file(group, str(name)) | given).items() if v != "???"}


def _file(group: str, name: str) -> dict[str, Any]:
    from actcache.cli import config_folder

    folder = config_folder() / group
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise SettingsError(f"live.{group}={name}: expected a mapping, or one of {known}")
    values = yaml.safe_load(path.read_text("utf-8")) or {}
    base: dict[str, Any] = {}
    for entry in values.pop("defaults", []):
        if entry != "_self_":
            base |= _file(group, str(entry))
    return base | values


def _asked(settings: CacheSettings) -> Sequence[str]:
    return (settings.hooks,) if isinstance(settings.hooks, str) else settings.hooks
