"""Fill a store: which units are missing, who does them, and writing beside the forward pass.

Any number of processes may run this on one store. Each claims a unit, commits its segments and goes
on to the next that is neither done nor claimed; a dead process's claim expires and its unit is
continued by another. Segments depend on the unit alone, so the result is the same for any number
of writers.

While one segment is permuted, checksummed and written in a thread, the next one runs through the
host; at most `WRITES` segments wait, so memory is bounded by WRITES + 1 segments.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from actcache import canary, ranks
from actcache.calibrate import calibrate
from actcache.capture import LazyCapture
from actcache.data import Context, Packing
from actcache.order import InputOrder
from actcache.sources import Source, Unit
from actcache.store.claims import Claims
from actcache.store.errors import SettingsError
from actcache.store.layout import CLAIMS, segment_id
from actcache.store.schema import Commit
from actcache.store.writer import StoreWriter

if TYPE_CHECKING:
    from actcache.run import CacheSettings

WRITES = 1  # segments that may wait to be written


def parse_part(part: str) -> tuple[int, int]:
    """'3/16' -> (2, 16). SettingsError if it is not i/n with 1 <= i <= n."""
    number, slash, of = part.partition("/")
    if slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of):
        return int(number) - 1, int(of)
    raise SettingsError(f"part={part}: expected i/n with 1 <= i <= n, such as part=3/16")


class WriteBehind:
    """Segments through the host, each written in a thread while the next one is computed."""

    def __init__(self, writer: StoreWriter, capture: LazyCapture) -> None:
        self.computed = 0  # rows that went through the host
        self._writer, self._capture = writer, capture
        self._queue: deque[Future[Commit]] = deque()

    def add(
        self,
        contexts: Sequence[Context],
        advance: Callable[[int], object],
        *,
        unit: int,
        index: int,
        last_in_unit: bool,
    ) -> None:
        """Run one segment through the host and hand it to the writing thread."""
        ranks.current().heed()
        if kept := self._capture.kept.pop(segment_id(unit, index), None):
            tokens, acts = kept
            advance(len(tokens))
        else:
            tokens, acts = self._capture.builder.build(contexts, advance)
        self.settle(WRITES - 1)
        self._queue.append(
            self._pool.submit(
                self._writer.write_segment,
                unit=unit,
                index=index,
                last_in_unit=last_in_unit,
                tokens=tokens,
                acts=[(info, acts[info.name]) for info in self._capture.infos],
                writer=self._capture.recorded,
            )
        )
        self.computed += len(tokens)

    def settle(self, waiting: int = 0) -> None:
        """Wait until at most `waiting` segments are unwritten; raises what a write raised."""
        while len(self._queue) > waiting:
            self._queue.popleft().result()

    def share(self, walk: Callable[[Claims], bool], tick: Callable[[], object]) -> bool:
        """Do `walk` again and again while it says that others hold some of its work.

        `tick()` is called while waiting. True if Ctrl-C ended it, here or on another rank; what has
        been computed by then is written.
        """
        claims = Claims(self._writer.path / CLAIMS, uuid.uuid4().hex[:8])
        stoppable = self._capture.interruptible()
        with ThreadPoolExecutor(1, "write") as self._pool, claims, stoppable:
            try:
                while self._capture.again(walk(claims), tick):
                    pass
            except KeyboardInterrupt:
                ranks.current().stop()
                self.settle()  # whole segments are worth a moment
                return True
        return False


class Filler:
    """One call of `actcache run` on one store."""

    def __init__(
        self,
        settings: CacheSettings,
        source: Source,
        packing: Packing,
        writer: StoreWriter,
        capture: LazyCapture,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.source, self.packing = settings, source, packing
        self.writer, self.capture, self.say = writer, capture, say
        self._written = WriteBehind(writer, capture)
        self._ids = capture.activation_ids
        self._order = InputOrder(settings, source, packing, capture.tokenizer, writer.identity)
        self._ended = False  # a stream has no more units
        self._empty: set[int] = set()  # units without a token
        self._canary = False  # it is in the store
        self._total = 0  # bytes of the whole plan, once known

    @property
    def computed(self) -> int:
        """Rows that went through the host in this call."""
        return self._written.computed

    # -- the plan ---------------------------------------------------------------------------------

    def _mine(self, position: int) -> bool:
        if self.settings.part is None:
            return True
        number, of = parse_part(self.settings.part)
        return position % of == number

    def _commits(self, unit: Unit) -> list[Commit]:
        """Committed segments of a unit that have all hooks, from the first without a gap."""
        found: list[Commit] = []
        while commits := self.writer.commits.get(segment_id(unit.number, len(found))):
            if not self.writer.has(commits[0].segment, self._ids):
                break
            found.append(commits[0])
        return found

    def wanted(self) -> list[str]:
        """Committed segments in plan order, as many as the budget asks for."""
        segments: list[str] = []
        rows = 0
        for unit in self._order.seen:
            for commit in self._commits(unit):
                if self._order.enough(rows):
                    return segments
                segments.append(commit.segment)
                rows += commit.rows
        return segments

    # -- the loop ---------------------------------------------------------------------------------

    def fill(self) -> bool:
        """Commit segments until the budget or the data ends; True if Ctrl-C ended it."""
        budget = self.settings.tokens
        before = sum(c[0].rows for c in self.writer.commits.values())
        if before:
            self.say(f"continuing: {before:,} tokens are committed already")
        bar = tqdm(
            total=budget,
            unit="tok",
            unit_scale=True,
            desc="caching",
            disable=not self.settings.progress,
        )
        with bar:
            advance = ranks.current().counting(bar, before)
            walk = partial(self._walk, bar=bar, advance=advance)
            if self._written.share(walk, lambda: advance(0)):
                return True
        for line in self.packing.report():
            self.say(line)
        rows = sum(self.writer.commits[s][0].rows for s in self.wanted())
        if budget is not None and rows < budget and self.settings.part is None:
            self.say(f"the data ended at {rows:,} tokens, before tokens={budget:,}")
        return False

    def _walk(self, claims: Claims, bar: Any, advance: Callable[[int], object]) -> bool:
        """Do every free unit of the plan; True if others still hold some that are wanted."""
        progress = self.settings.progress
        if not calibrate(self.capture, self.writer, self._segments(), claims, progress):
            return True
        before, busy = 0, False  # rows committed in earlier units
        for position, unit in enumerate(self._order.units()):
            if self._order.enough(before):
                break
            done = self._done(unit, before)
            if not done and self._mine(position):
                name = f"u{unit.number:05d}"
                if claims.acquire(name):
                    self.writer.refresh()  # another may have done it since the last look
                    self._fill_unit(unit, before, advance)
                    self._written.settle()
                    claims.release(name)
                    self._write_canary()
                else:
                    busy = True
            self.writer.refresh()
            rows = sum(c.rows for c in self._commits(unit))
            before += rows
            bar.n = max(bar.n, before)
            self._guess_total(bar, position + 1, before)
            if not rows and self._ended:
                break
        return busy and not self._order.enough(before)

    def _guess_total(self, bar: Any, units: int, rows: int) -> None:
        """Without a budget: tokens in all by the share of bytes read, so that time left shows."""
        if self.settings.tokens is None and self.source.identity["kind"] == "parquet":
            done = sum(u.bytes for u in self._order.seen[:units])
            self._total = self._total or sum(
                u.bytes for u in self.source.units(self.settings.layout.unit_bytes)
            )
            bar.total = max(bar.n, int(rows * self._total / max(1, done)))

    def _write_canary(self) -> None:
        """While the host is loaded and the plan's first segment is committed: its canary, once."""
        if not self.computed or self._canary:
            return
        for unit in self._order.seen:
            if commits := self._commits(unit):
                canary.write(self.writer, commits[0].segment, self.capture)
                self._canary = True
            if commits or unit.number not in self._empty:
                return

    def _done(self, unit: Unit, before: int) -> bool:
        """Whether the unit lacks nothing that the budget asks for behind `before` rows."""
        commits = self._commits(unit)
        whole = bool(commits) and commits[-1].last_in_unit
        return whole or self._order.enough(before + sum(c.rows for c in commits))

    def _segments(self) -> Iterator[tuple[str, list[Context]]]:
        """The segments of the whole plan from its start, committed or not, up to the budget."""
        return ((segment, contexts) for segment, contexts, _ in self._order.segments())

    def _fill_unit(self, unit: Unit, before: int, advance: Callable[[int], object]) -> None:
        """Commit the segments that the unit lacks, until the budget is met."""
        stream = self._order.contexts(unit)
        chunk, index = next(stream, []), 0
        if not chunk:
            self._empty.add(unit.number)
        self._ended = self._ended or (not chunk and self.source.identity["kind"] != "parquet")
        while chunk and not self._order.enough(before):
            following = next(stream, [])
            segment = segment_id(unit.number, index)
            rows = sum(map(len, chunk))
            if not self.writer.has(segment, self._ids):
                self._written.add(
                    chunk,
                    advance,
                    unit=unit.number,
                    index=index,
                    last_in_unit=not following,
                )
            before, chunk, index = before + rows, following, index + 1
