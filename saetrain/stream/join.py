"""Several stores of one token stream read as one: the same tokens, another model or revision.

`join({"base": a, "chat": b})` is a snapshot whose hooks are `base:resid.2`, `chat:resid.2`, ... and
whose rows are those of the first store. A row's partner is the row with the same (doc, ctx, pos).
Where two stores wrote a segment in the same order, which equal digests of their token tables prove
without reading them, nothing has to be done; otherwise both tables are sorted by (ctx, pos), and
every column must agree. Stores may differ in chunk size and storage type, not in segmentation.

Cost: none in the same order. In another order (permuted and context) any few rows of one store are
spread over the whole segment of the other, so whole segments are read together: every byte is still
read once, windows hold at least a segment, and 4 bytes a row are kept of 32 segments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from actcache.store import HookInfo, HookMissingError, Snapshot, Store
from actcache.store.ids import leaves
from actcache.store.stats import MergedStats
from saetrain.errors import ConfigError
from saetrain.stream.aligned import JoinedSegment, row_places

_LABEL = re.compile(r"[A-Za-z0-9_-]+")
_SEGMENTATION = ("context", "segment_rows", "unit_bytes")  # fields of a store's layout
_MAPS = 32  # segments whose row numbers are kept


def join(snapshots: Mapping[str, Snapshot]) -> JoinedSnapshot:
    """The segments that all stores have, row by row. The first store gives order and tokens.

    Raises ConfigError naming every field in which the stores' token streams or segmentations
    differ, or if no segment is in all of them; DamagedError if equal ids hide other tokens (of the
    first segment at once, of others when they are read).
    """
    labels = list(snapshots)
    if len(labels) < 2:
        raise ConfigError(f"stores: expected at least two stores to join, got {labels}")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ConfigError(
                f"stores: {label!r} cannot name a store in hooks such as LABEL:resid.2; use "
                "letters, digits, _ and -"
            )
    for label in labels[1:]:
        _check_pair(labels[0], snapshots[labels[0]], label, snapshots[label])
    joined = JoinedSnapshot(dict(snapshots))
    if not joined.segments:
        raise ConfigError(
            f"the stores {', '.join(labels)} have no segment in common. {joined.left_out_text()}"
        )
    joined.segments[0].check()
    return joined


def _check_pair(a: str, first: Snapshot, b: str, other: Snapshot) -> None:
    mine, theirs = first.store.identity, other.store.identity
    wrong = [
        f"{key}: {a} has {x}, {b} has {y}"
        for key, x, y in leaves(mine.token_stream, theirs.token_stream)
    ]
    if not wrong and mine.token_stream_id != theirs.token_stream_id:
        wrong = [f"token_stream_id: {a} has {mine.token_stream_id}, {b} {theirs.token_stream_id}"]
    if wrong:
        raise ConfigError(
            f"{a} and {b} cannot be joined, they hold other tokens: {'; '.join(wrong)}. Cache both "
            "models with the same data, tokenizer and context"
        )
    layouts = [(k, getattr(mine.layout, k), getattr(theirs.layout, k)) for k in _SEGMENTATION]
    wrong = [f"layout.{k}: {a} has {x}, {b} has {y}" for k, x, y in layouts if x != y]
    if wrong:
        raise ConfigError(
            f"{a} and {b} cannot be joined, the same tokens are cut into other segments: "
            f"{'; '.join(wrong)}. Cache one of them again with the layout of the other"
        )


@dataclass(frozen=True)
class JoinedSnapshot(MergedStats):
    """What a stream needs of a snapshot, over several stores. Made by `join`."""

    snapshots: dict[str, Snapshot]  # by label; the first one leads

    @property
    def lead(self) -> Snapshot:
        return next(iter(self.snapshots.values()))

    @property
    def store(self) -> Store:
        """Of the first snapshot, for layout and path."""
        return self.lead.store

    @property
    def store_id(self) -> dict[str, str]:
        """The id of each store by its label; `name` likewise."""
        return {label: s.store_id for label, s in self.snapshots.items()}

    @property
    def name(self) -> dict[str, str]:
        return {label: s.name for label, s in self.snapshots.items()}

    @property
    def token_stream_id(self) -> str:
        return str(self.lead.token_stream_id)

    @property
    def context(self) -> int:
        return int(self.lead.context)

    @property
    def n_rows(self) -> int:
        return sum(s.n_rows for s in self.segments)

    @cached_property
    def segments(self) -> tuple[JoinedSegment, ...]:
        """Segments that every store has, with equally many rows."""
        stores = {label: {s.id: s for s in snap.segments} for label, snap in self.snapshots.items()}
        parts = [
            {label: have[lead.id] for label, have in stores.items() if lead.id in have}
            for lead in self.lead.segments
        ]
        whole = [
            p for p in parts if len(p) == len(stores) and len({s.n_rows for s in p.values()}) == 1
        ]
        kept = lru_cache(maxsize=_MAPS)(lambda i, label: row_places(whole[i], label))
        return tuple(
            JoinedSegment(p, lambda label, i=i: kept(i, label))  # type: ignore[misc]
            for i, p in enumerate(whole)
        )

    @cached_property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """Segments of each store without an equal partner in all others, by label."""
        common = {s.id for s in self.segments}
        return {
            label: tuple(s.id for s in snap.segments if s.id not in common)
            for label, snap in self.snapshots.items()
        }

    def left_out_text(self) -> str:
        """One sentence for the user; empty if nothing was left out."""
        lost = [
            f"{len(ids):,} of {label} ({ids[0]}, …)" for label, ids in self.left_out.items() if ids
        ]
        if not lost:
            return ""
        return f"Segments left out, other stores have no equal ones: {', '.join(lost)}"

    @cached_property
    def hooks(self) -> Mapping[str, HookInfo]:
        """Hooks of all stores, `label:name`."""
        return {
            f"{label}:{name}": replace(info, name=f"{label}:{name}")
            for label, snap in self.snapshots.items()
            for name, info in snap.hooks.items()
        }

    def resolve_hook(self, name: str) -> str:
        """`label:` and the stored name of a hook; any spelling that the store itself takes.

        Raises HookMissingError listing what there is.
        """
        label, colon, hook = name.partition(":")
        if colon and label in self.snapshots:
            return f"{label}:{self.snapshots[label].resolve_hook(hook)}"
        raise HookMissingError(
            f"hook {name!r}: several stores are joined, so say of which, such as "
            f"{next(iter(self.hooks))}. There are: {', '.join(self.hooks)}"
        )

    def vocab(self) -> list[bytes]:
        """The exact bytes of every token id."""
        return self.lead.vocab()


AnySnapshot = Snapshot | JoinedSnapshot
