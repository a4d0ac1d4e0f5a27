"""Whole contexts with a mask, for models that attend: batches (S, T, d) instead of rows (B, d).

A context is put together from wherever its rows are: side by side in stores of `order: context`,
anywhere in their segment in permuted ones, where whole segments are read and every row is copied to
its place, which sorts them. Contexts are shuffled as rows are in `stream`, by keyed order and
windows, so batches resume by arithmetic; context i of an epoch belongs to rank i mod world, so
ranks have equal shares where world divides S.

Two masks. `present`: the row is there, a model may attend to it. `mask`: it counts, in the loss or
a metric. Held-out documents in a context of the train split are not there at all: zeros, present
False, as padding. So no held-out activation leaves a train stream and no other row is lost; the
rows behind them have seen them in the host, as in every token stream of packed contexts. In the
held-out split all rows are present and only held-out ones count. Special tokens are present and do
not count, unless skip_special=False. Contexts without a row that counts are left out.

Cost: a window of at least a segment for permuted stores, shared by ranks; each rank reads the
chunks that hold its contexts, in permuted stores all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import DamagedError, TokenTable
from actcache.store.layout import TOKEN_COLUMNS
from actcache.store.split import held_out
from saetrain.errors import ConfigError
from saetrain.stream.aligned import AnySegment, unit_rows
from saetrain.stream.batch import Batch
from saetrain.stream.device import Stored
from saetrain.stream.join import AnySnapshot
from saetrain.stream.loader import Loaded, Places
from saetrain.stream.order import Window
from saetrain.stream.rows import RowFilter
from saetrain.stream.stream import Stream, _parts
from saetrain.units import DOCUMENT, MASK, PRESENT, Unit

_UNITS = 16  # of a segment whose contexts lie side by side, at most: each reads its token table
_PIECE_CHUNKS = 8  # chunks that a thread reads in one go


@dataclass(frozen=True)
class SequenceBatch(Batch):
    """S contexts of T positions. `acts[hook]` is (S, T, d), zeros where `present` is False.

    Columns of `tokens` are (S, T), zeros where `present` is False. `segment` and `ctx`, (S,), say
    which context each is.
    """

    ctx: NDArray[np.int64]  # (S,) number of the context in its segment
    mask: Tensor  # (S, T) bool: counts
    present: Tensor  # (S, T) bool: may be attended to
    apart: bool = False  # the host kept packed documents apart: rows attend within their own

    @property
    def n_tokens(self) -> int:
        """Positions, S x T, whether they count or not."""
        return self.mask.numel()

    @property
    def n_counted(self) -> int:
        """Rows that count."""
        return int(self.mask.sum())

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Activations (S, T, d) and masks, see `saetrain.units`."""
        masks = {MASK: self.mask, PRESENT: self.present}
        if self.apart:
            documents = torch.from_numpy(self.tokens.doc.view(np.int64))
            masks[DOCUMENT] = documents.to(self.mask.device)
        return {**self.acts, **masks}

    def counted(self) -> tuple[dict[str, Tensor], NDArray[np.int32], NDArray[Any]]:
        """(activations (N, d) by hook, segment (N,), ctx (N,)) of the rows that count."""
        acts = {hook: x[self.mask] for hook, x in self.acts.items()}
        at = np.nonzero(self.mask.cpu().numpy())[0]
        return acts, self.segment[at], self.ctx[at]


@dataclass(frozen=True)
class SequencePlaces(Places):
    """Places of the rows of this rank's contexts. `at` and `segment` are per context, (L,)."""

    ctx: NDArray[np.int64]  # (L,)
    mask: NDArray[np.bool_]  # (L, T)
    length: int  # T; `row` is (L * T,), -1 where there is none

    def __len__(self) -> int:
        """Rows of the window's memory."""
        return len(self.at) * self.length


class SequenceStream(Stream):
    """A `Stream` of whole contexts: same order, state, ranks and sources, joined stores included.

    `n_rows` counts the rows that count, `n_sequences` contexts; `batch_tokens` is S x T.
    """

    unit: ClassVar[Unit] = "sequence"

    def __init__(
        self, snapshot: AnySnapshot, hooks: Sequence[str], *, batch_sequences: int = 8, **kw: Any
    ) -> None:
        """`batch_sequences` is S of the global batch; others are those of `Stream`.

        Contexts of `window_rows` rows in all are shuffled together, for permuted stores those of
        at least one segment. ConfigError and HookMissingError as there.
        """
        if "batch_tokens" in kw:
            raise ConfigError("SequenceStream: give batch_sequences instead of batch_tokens")
        if kw.get("max_norm") is not None:
            raise ConfigError("SequenceStream: max_norm is for streams of rows; leave it out")
        if batch_sequences < 1:
            raise ConfigError(f"batch_sequences: expected at least 1, got {batch_sequences}")
        self.batch_sequences, self.length = batch_sequences, int(snapshot.context)
        super().__init__(snapshot, hooks, batch_tokens=batch_sequences * self.length, **kw)
        self._per_batch = batch_sequences
        self._per_window = max(batch_sequences, self.window_rows // self.length)
        self.n_sequences = self._per_epoch
        packing = snapshot.store.identity.token_stream.get("packing", {})
        self.apart = not packing.get("attend_across_documents", True)
        self.batches_per_epoch = self.n_sequences // batch_sequences

    def _count(self) -> tuple[NDArray[np.int32], int]:
        segments: Sequence[AnySegment] = self.snapshot.segments
        with ThreadPoolExecutor(self.threads, "filter") as pool:
            found = list(pool.map(lambda s: _contexts(s, self.filter), segments))
        self._eligible = [wanted for wanted, _ in found]
        self._unit = [
            self._unit_of(s, len(e)) for s, e in zip(segments, self._eligible, strict=True)
        ]
        units = [-(-len(e) // u) for e, u in zip(self._eligible, self._unit, strict=True)]
        self._first_unit = np.concatenate([[0], np.cumsum(units)]).astype(np.int64)
        counts = [
            np.add.reduceat(e.astype(np.int32), np.arange(0, len(e), u))
            for e, u in zip(self._eligible, self._unit, strict=True)
        ]
        per_unit = np.concatenate(counts) if counts else np.zeros(0, np.int32)
        return per_unit.astype(np.int32), sum(rows for _, rows in found)

    def _unit_of(self, segment: AnySegment, contexts: int) -> int:
        """Contexts that are read together."""
        rows = unit_rows(segment, self.hooks, self.run_chunks)
        if self.snapshot.store.identity.layout.order != "context" or rows >= segment.n_rows:
            return contexts
        return max(-(-rows // self.length), -(-contexts // _UNITS))

    def _too_few(self) -> str:
        return (
            f"batch_sequences={self.batch_sequences:,} is more than the {self.n_sequences:,} "
            f"contexts of the {self.filter.split} split; lower it or cache more tokens"
        )

    def state_dict(self) -> dict[str, Any]:
        """As `Stream.state_dict`."""
        return super().state_dict() | {"batch_sequences": self.batch_sequences}

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Shuffled batches of contexts from the current state on, without end."""
        return cast(Iterator[SequenceBatch], self._finished(super().__iter__()))

    def one_pass(self) -> Iterator[SequenceBatch]:
        """Every eligible context once, in stored order; the last batch may be short."""
        return cast(Iterator[SequenceBatch], self._finished(super().one_pass()))

    def _finished(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Rows (S T, d) as (S, T, d), and zeros where there is none: memory is used again."""
        for batch in batches:
            assert isinstance(batch, SequenceBatch)
            whole = bool(batch.present.all())
            mask, present = batch.mask.to(self.device), batch.present.to(self.device)
            shape = (len(batch), self.length)
            acts = {h: x.view(*shape, x.shape[-1]) for h, x in batch.acts.items()}
            for x in () if whole else acts.values():
                x.masked_fill_(~present[..., None], 0)
            yield replace(batch, acts=acts, mask=mask, present=present, apart=self.apart)

    def _batch(
        self, held: Sequence[Loaded], first: int, last: int, epoch: int, step: int
    ) -> tuple[Batch, Stored]:
        t = self.length
        cuts = [(h, cast(SequencePlaces, h.places), h.places.between(first, last)) for h in held]
        cuts = [(h, p, c) for h, p, c in cuts if c.stop > c.start] or cuts[:1]
        parts = [(h, slice(c.start * t, c.stop * t)) for h, _, c in cuts]
        segment = np.concatenate([p.segment[c] for _, p, c in cuts])
        row = np.concatenate(
            [p.row[rows] for (_, p, _), (_, rows) in zip(cuts, parts, strict=True)]
        )
        mask = np.concatenate([p.mask[c] for _, p, c in cuts])
        present = torch.from_numpy((row >= 0).reshape(-1, t))
        self.traffic.rows += int((row >= 0).sum())
        batch = SequenceBatch(
            {},
            lambda: self._tables(segment, row),
            segment,
            epoch,
            step,
            np.concatenate([p.ctx[c] for _, p, c in cuts]),
            torch.from_numpy(mask),
            present,
        )
        return batch, {hook: _parts(hook, parts) for hook in self.hooks}

    def _tables(self, segment: NDArray[np.int32], row: NDArray[np.int32]) -> TokenTable:
        """Columns (S, T) of the rows given, -1 for none."""
        there = np.flatnonzero(row >= 0)
        found = self.table_of(np.repeat(segment, self.length)[there], row[there])
        columns = []
        for name, dtype in TOKEN_COLUMNS.items():
            column = np.zeros(len(row), dtype=dtype)
            column[there] = getattr(found, name)
            columns.append(column.reshape(-1, self.length))
        return TokenTable(*columns)

    # -- where rows come from ----------------------------------------------------------------------

    def places(self, window: Window) -> SequencePlaces:
        """Where the rows of this rank's contexts of a window come from."""
        found = [self._contexts_of(int(u)) for u in window.units]
        segment = np.repeat([s for s, _ in found], [len(c) for _, c in found]).astype(np.int32)
        ctx = np.concatenate([c for _, c in found])
        order = window.order()
        at = np.flatnonzero((window.first + np.arange(len(order))) % self.world == self.rank)
        segment, ctx = segment[order[at]], ctx[order[at]]
        row = np.full(len(at) * self.length, -1, dtype=np.int32)
        mask = np.zeros(len(row), dtype=np.bool_)
        units: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
        for s in np.unique(segment).tolist():
            slots = np.flatnonzero(segment == s)
            rows, to, counts = self._rows_of(s, ctx[slots], slots)
            row[to], mask[to] = rows, counts
            units += self._pieces(s, rows, to)
        masks = mask.reshape(-1, self.length)
        return SequencePlaces(window, at, segment, row, units, ctx, masks, self.length)

    def _contexts_of(self, unit: int) -> tuple[int, NDArray[np.int64]]:
        """(segment, eligible contexts of it) of a unit."""
        s = int(np.searchsorted(self._first_unit, unit, side="right")) - 1
        first = (unit - int(self._first_unit[s])) * self._unit[s]
        return s, first + np.flatnonzero(self._eligible[s][first : first + self._unit[s]])

    def _rows_of(
        self, s: int, ctx: NDArray[np.int64], slots: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Rows of contexts `ctx` of a segment, where they go, and whether they count."""
        table = self._table(s)
        slot_of = np.full(len(self._eligible[s]), -1, dtype=np.int64)
        slot_of[ctx] = slots
        slot = slot_of[table.ctx]
        rows = np.flatnonzero((slot >= 0) & _present(table.doc, self.filter))
        pos = table.pos[rows].astype(np.int64)
        if len(pos) and int(pos.max()) >= self.length:
            raise DamagedError(
                f"segment {self.snapshot.segments[s].id}: position {pos.max()} is beyond the "
                f"store's context of {self.length}"
            )
        counts = self.filter.keep(table.flags[rows], table.doc[rows])
        return rows, slot[rows] * self.length + pos, counts

    def _pieces(
        self, s: int, rows: NDArray[np.int64], to: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Work for several threads, unless any few rows of a joined store are all over it."""
        segment = self.snapshot.segments[s]
        size = max(segment.hooks[h].chunk_rows for h in self.hooks) * _PIECE_CHUNKS
        if unit_rows(segment, self.hooks, 1) >= segment.n_rows:
            size = segment.n_rows
        cuts = np.flatnonzero(np.diff(rows // size)) + 1
        pieces = zip(np.split(rows, cuts), np.split(to, cuts), strict=True)
        return ((s, r, t) for r, t in pieces if len(r))


def _present(doc: NDArray[np.uint64], wanted: RowFilter) -> NDArray[np.bool_]:
    """Which rows a model of this split may see at all."""
    if wanted.split != "train":
        return np.ones(len(doc), dtype=np.bool_)
    return ~held_out(doc, wanted.held_out_fraction)


def _contexts(segment: AnySegment, wanted: RowFilter) -> tuple[NDArray[np.bool_], int]:
    """Which contexts of a segment hold a row that counts, (C,), and how many such rows."""
    ctx = segment.column("ctx")
    if int(ctx.max()) >= segment.n_rows:
        raise DamagedError(f"segment {segment.id}: a context's number is beyond its rows")
    keep = wanted.keep(segment.column("flags"), segment.column("doc"))
    eligible = np.zeros(int(ctx.max()) + 1, dtype=np.bool_)
    eligible[ctx[keep]] = True
    return eligible, int(keep.sum())
