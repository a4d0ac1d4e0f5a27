"""Shuffled batches of activations from a snapshot, in bounded memory, the same on every machine.

The rows of an epoch form one fixed sequence (see `order`), a function of (snapshot, filter, seed,
epoch); batch `step` is a slice of it, whoever reads it: a stream stopped anywhere resumes by
arithmetic, and 1, 2 or 8 ranks share equal global batches. While one window is handed out, the next
is read and shuffled by threads (see `loader`). A batch is a slice of its window, without a copy
where type and device are those of the store.

Ranks: each unit of a window belongs to one rank, so every byte is read once in all. A rank's share
of a batch has about B / world rows; shares differ by chance (± a few per cent) and add up to B.

Cost: two windows of rows in memory, whatever the size of the store. Rows left over at the end of
an epoch (fewer than B) are dropped; they are others in the next epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import TokenTable
from actcache.store.int8_reader import Int8Reader
from actcache.store.layout import Modality
from saetrain.errors import ConfigError
from saetrain.saes.base import HookSpace
from saetrain.stream.ahead import Traffic, changes, cut, read_ahead
from saetrain.stream.aligned import stored, unit_rows
from saetrain.stream.batch import Batch
from saetrain.stream.device import Stored, cat, to_device
from saetrain.stream.join import AnySnapshot
from saetrain.stream.loader import Loaded, Loader, Places, places
from saetrain.stream.order import Window, windows
from saetrain.stream.rows import EligibleRows, RowFilter, Split

_TABLES = 16  # token tables kept
_MOST_ROWS = 1 << 23  # of a window: the next unit must still fit below 2**24


class Stream:
    """Iterate to get shuffled batches without end; `one_pass` reads every row once, in order."""

    def __init__(
        self,
        snapshot: AnySnapshot,
        hooks: Sequence[str],
        *,
        batch_tokens: int = 4096,
        seed: int = 0,
        split: Split = "train",
        held_out_fraction: float = 0.05,
        skip_special: bool = True,
        modality: Modality = "all",
        roles: Sequence[str] | None = None,
        max_norm: float | None = None,
        window_rows: int = 65_536,
        run_chunks: int = 1,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        direct: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Reads flags and document keys to count eligible rows; no activations yet.

        `batch_tokens` is the global batch; `rank` of `world` gets its share of it. `run_chunks`
        neighbouring chunks are read at once: more is faster on slow disks and mixes less.
        `shuffle=False` keeps units in stored order and shuffles within windows only, as a live
        source has to. Raises HookMissingError for a hook the store has not, ConfigError for
        numbers that cannot work. `max_norm` leaves out rows longer than so many mean lengths of
        any of the hooks; statistics (`space`) are those of the store, with them. `direct`: read
        past the page cache (O_DIRECT); None: if half of the memory cannot hold the hooks' rows,
        since pages would be dropped before the next epoch wants them.
        """
        self.snapshot = snapshot
        self.hooks = tuple(snapshot.resolve_hook(h) for h in hooks)
        self.batch_tokens, self.seed, self.shuffle = batch_tokens, seed, shuffle
        self.window_rows, self.run_chunks = window_rows, run_chunks
        self.rank, self.world, self.threads = rank, world, threads or min(4, os.cpu_count() or 1)
        self.dtype, self.device = dtype, torch.device(device)
        self._check()
        self.direct = self._beyond_memory() if direct is None else direct
        self.filter = RowFilter(
            split=split,
            held_out_fraction=held_out_fraction,
            skip_special=skip_special,
            modality=modality,
            roles=None if roles is None else tuple(roles),
            max_norm=max_norm,
        )
        # What is shuffled, rows here: how many there are in a batch, a window, each unit, an epoch.
        self._per_batch, self._per_window = batch_tokens, window_rows
        self._per_unit, self.n_rows = self._count()
        self._per_epoch = int(self._per_unit.sum(dtype=np.int64))
        self.batches_per_epoch = self._per_epoch // self._per_batch
        self.epoch, self.step_in_epoch = 0, 0
        self.traffic = Traffic()
        self._table = lru_cache(maxsize=_TABLES)(lambda s: snapshot.segments[s].tokens())
        self._calibration = lru_cache(maxsize=None)(self._calibration_of)

    def _count(self) -> tuple[NDArray[np.int32], int]:
        """What each unit has to offer, and the eligible rows in all."""
        together = [unit_rows(s, self.hooks, self.run_chunks) for s in self.snapshot.segments]
        norms = {} if self.filter.max_norm is None else self._mean_norms()
        self.eligible = EligibleRows(
            self.snapshot.segments, together, self.filter, self.threads, norms
        )
        return self.eligible.counts, self.eligible.n_rows

    def _beyond_memory(self) -> bool:
        infos = [self.snapshot.hooks[h] for h in self.hooks]
        size = sum(self.snapshot.n_rows * i.chunk_bytes // i.chunk_rows for i in infos)
        return size > memory_bytes() // 2

    def _mean_norms(self) -> dict[str, float]:
        special = not self.filter.skip_special
        return {h: self.snapshot.stats(h, special=special).mean_norm for h in self.hooks}

    def _check(self) -> None:
        for name in ("batch_tokens", "window_rows", "run_chunks", "world", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank: expected 0 <= rank < world={self.world}, got {self.rank}")
        if self.window_rows > _MOST_ROWS:
            raise ConfigError(
                f"window_rows={self.window_rows:,}: expected at most {_MOST_ROWS:,} rows"
            )
        if not self.hooks:
            raise ConfigError("hooks is empty: name at least one hook of the store")

    # -- what the stream knows ---------------------------------------------------------------------

    def space(self, hook: str) -> HookSpace:
        """Width and statistics of a hook, from the store's commits."""
        stats = self.snapshot.stats(hook, special=not self.filter.skip_special)
        return HookSpace.of(hook, stats)

    def state_dict(self) -> dict[str, Any]:
        """A few integers and names; enough to continue with exactly the next batch.

        `world` is not among them: another number of ranks continues with the same global batches.
        """
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "store_id": self.snapshot.store_id,
            "snapshot": self.snapshot.name,
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "window_rows": self.window_rows,
            "run_chunks": self.run_chunks,
            "shuffle": self.shuffle,
            "filter": self.filter.to_json(),
            "n_rows": self.n_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. ConfigError if this stream would give other batches."""
        mine = self.state_dict()
        del mine["epoch"], mine["step_in_epoch"]
        if wrong := changes(state, mine):
            raise ConfigError(f"cannot resume the stream, it changed: {'; '.join(wrong)}")
        self.epoch, self.step_in_epoch = int(state["epoch"]), int(state["step_in_epoch"])

    # -- batches -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Shuffled batches from the current state on, epoch after epoch, without end."""
        if self.batches_per_epoch == 0:
            raise ConfigError(self._too_few())
        steps, each = self.batches_per_epoch, self._per_batch
        for batch in self.slices(self.epoch, self.step_in_epoch, steps, lambda s: s * each):
            self.epoch, self.step_in_epoch = divmod(batch.step + 1, steps)
            yield batch

    def _too_few(self) -> str:
        return (
            f"batch_tokens={self.batch_tokens:,} is more than the {self.n_rows:,} rows of the "
            f"{self.filter.split} split; lower batch_tokens or cache more tokens"
        )

    def slices(
        self, epoch: int, step: int, steps: int, bound: Callable[[int], int]
    ) -> Iterator[Batch]:
        """Batches from `step` of `epoch` on, without end, `steps` in an epoch.

        Batch s holds rows [bound(s), bound(s + 1)) of its epoch; it is left out where that is none.
        """
        plan = self._all_windows(epoch, bound(step), bound(steps))
        yield from to_device(self._batches(plan, step, steps, bound), self.device, self._decode)

    def one_pass(self) -> Iterator[Batch]:
        """Every eligible row once, in stored order; the last batch may be short."""
        n, each = self._per_epoch, self._per_batch
        yield from self.in_order(-(-n // each), lambda s: min(n, s * each))

    def in_order(self, steps: int, bound: Callable[[int], int]) -> Iterator[Batch]:
        """`one_pass`, cut as `slices` does."""
        plan = windows(
            self._per_unit,
            window_rows=self._per_window,
            key="",
            shuffle_units=False,
            shuffle_rows=False,
        )
        pieces = self._batches(((0, w) for w in plan), 0, steps, bound)
        yield from to_device(pieces, self.device, self._decode)

    def _all_windows(self, epoch: int, first: int, end: int) -> Iterator[tuple[int, Window]]:
        """(epoch, window) from row `first` of `epoch` on; windows beyond row `end` are left out."""
        while True:
            yield from ((epoch, w) for w in self.windows(epoch, first) if w.first < end)
            epoch, first = epoch + 1, 0

    def windows(self, epoch: int, first: int = 0) -> Iterator[Window]:
        """The windows of an epoch, from the one that holds row `first` of it."""
        return windows(
            self._per_unit,
            window_rows=self._per_window,
            key=f"{self.seed}/{epoch}",
            shuffle_units=self.shuffle,
            skip_rows=first,
        )

    def _batches(
        self, plan: Iterator[tuple[int, Window]], step: int, steps: int, bound: Callable[[int], int]
    ) -> Iterator[tuple[Batch, Stored]]:
        """Batches from `step` on of epochs that have `steps` batches each, cut at `bound`."""
        return cut(self._loaded(plan), step, steps, bound, self._batch)

    def _batch(
        self, held: Sequence[Loaded], first: int, last: int, epoch: int, step: int
    ) -> tuple[Batch, Stored]:
        cuts = [(h, h.places.between(first, last)) for h in held]
        cuts = [(h, c) for h, c in cuts if c.stop > c.start] or cuts[:1]
        stored = {hook: _parts(hook, cuts) for hook in self.hooks}
        segment = _joined([h.places.segment[c] for h, c in cuts])
        row = _joined([h.places.row[c] for h, c in cuts])
        self.traffic.rows += len(segment)
        return Batch({}, lambda: self.table_of(segment, row), segment, epoch, step), stored

    def _decode(self, hook: str, parts: tuple[Tensor, ...]) -> Tensor:
        """(n, d) in the type asked for, on the device of `parts`."""
        if len(parts) == 1:
            return parts[0].to(self.dtype)
        codes, scale = parts
        mean, std = self._calibration(hook)
        return codes.to(torch.float32).mul_(scale).mul_(std).add_(mean).to(self.dtype)

    def _calibration_of(self, hook: str) -> tuple[Tensor, Tensor]:
        """Mean and std (d,) that decode a hook stored as int8, on the device."""
        reader = stored(self.snapshot.segments[0], hook)
        assert isinstance(reader, Int8Reader)
        mean, std = reader.mean.copy(), reader.std.copy()
        return torch.from_numpy(mean).to(self.device), torch.from_numpy(std).to(self.device)

    def table_of(self, segment: NDArray[np.int32], row: NDArray[np.int32]) -> TokenTable:
        """The token table of rows given as (segment, row in it)."""
        parts = {int(s): np.flatnonzero(segment == s) for s in np.unique(segment)}
        if not parts:
            return self._table(0).take(slice(0, 0))
        tables = [self._table(s).take(row[at].astype(np.int64)) for s, at in parts.items()]
        back = np.argsort(np.concatenate(list(parts.values())), kind="stable")
        columns = zip(*(vars(t).values() for t in tables), strict=True)
        return TokenTable(*(np.concatenate(c)[back] for c in columns))

    # -- windows, read ahead -----------------------------------------------------------------------

    def places(self, window: Window) -> Places:
        """Where this rank's rows of a window come from."""
        return places(window, self.eligible, self.rank, self.world)

    def _loaded(self, plan: Iterator[tuple[int, Window]]) -> Iterator[tuple[int, Loaded]]:
        """Windows in order; the next one is read while one is in use."""
        pin = self.device.type == "cuda"
        loader = Loader(
            self.snapshot.segments, self.hooks, threads=self.threads, pin=pin, direct=self.direct
        )
        return read_ahead(loader, plan, self.places, self.traffic)


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _parts(hook: str, cuts: Sequence[tuple[Loaded, slice]]) -> tuple[Tensor, ...]:
    """Stored rows of a batch: activations, and scales where they are int8 codes."""
    rows = cat([h.acts[hook][c] for h, c in cuts])
    if hook not in cuts[0][0].scales:
        return (rows,)
    return rows, cat([h.scales[hook][c] for h, c in cuts])


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
