"""What a run's input comes to: its units in order, and the contexts of each segment.

A function of data, packing and layout alone; who computes a segment, when, and whether it is
written or only looked at (`actcache.live`), changes nothing. Units are read when they are come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actcache.data import Context, Packing
from actcache.sources import Source, Unit
from actcache.store.ids import digest
from actcache.store.layout import segment_id
from actcache.store.schema import Identity

if TYPE_CHECKING:
    from actcache.run import CacheSettings


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a segment stands in the order; enough to go on from there."""

    unit: int = 0  # position of its unit in the order
    index: int = 0  # number inside the unit
    number: int = 0  # segments before
    rows: int = 0  # in all segments before


class InputOrder:
    """The input of `settings`, from the start as often as it is walked."""

    def __init__(
        self,
        settings: CacheSettings,
        source: Source,
        packing: Packing,
        tokenizer: Any,
        identity: Identity,
    ) -> None:
        self.settings, self.source, self.packing = settings, source, packing
        self._tokenizer, self._identity = tokenizer, identity
        self.seen: list[Unit] = []  # units come to so far, in order
        self._rest = self._ordered()

    def _ordered(self) -> Iterator[Unit]:
        """Parquet units in keyed random order, a fair sample anywhere; a stream's as they come."""
        units = self.source.units(self.settings.layout.unit_bytes)
        if self.source.identity["kind"] != "parquet":
            return units
        key = self._identity.token_stream_id
        return iter(sorted(units, key=lambda unit: digest([key, unit.number])))

    def units(self) -> Iterator[Unit]:
        """All units."""
        yield from list(self.seen)
        for unit in self._rest:
            self.seen.append(unit)
            yield unit

    def contexts(self, unit: Unit) -> Iterator[list[Context]]:
        """The contexts of each segment of a unit."""
        stream = self.packing.contexts(self.source.read(unit), self._tokenizer)
        return self.packing.segments(stream, self._identity.layout.segment_rows)

    def enough(self, rows: int) -> bool:
        """Whether the budget of tokens asks for no more than `rows`."""
        return self.settings.tokens is not None and rows >= self.settings.tokens

    def segments(self, start: Place | None = None) -> Iterator[tuple[str, list[Context], Place]]:
        """Id, contexts and place of every segment up to the budget, from `start` on.

        Units before that of `start` are not read.
        """
        at = start or Place()
        rows, number = at.rows, at.number
        for position, unit in enumerate(self.units()):
            if position < at.unit:
                continue
            index = -1
            for index, chunk in enumerate(self.contexts(unit)):
                if position == at.unit and index < at.index:
                    continue
                if self.enough(rows):
                    return
                here = Place(unit=position, index=index, number=number, rows=rows)
                yield segment_id(unit.number, index), chunk, here
                rows, number = rows + sum(map(len, chunk)), number + 1
            ended = index < 0 and self.source.identity["kind"] != "parquet"
            if ended or self.enough(rows):  # a stream ends with a unit that has nothing
                return
