"""From shard files into shuffled windows: the hot path of the stream.

A chunk is read into a small scratch buffer of the reading thread, which stays in the processor's
cache; its checksum is taken there, and its eligible rows are copied straight to their shuffled
places in a preallocated window. So a byte crosses main memory once on its way, as it would when
reading without shuffling. Windows are reused as soon as no batch refers to them any more. Units of
one chunk of a plain file take the compiled path (see `hot`), a few at a time; what that cannot do,
or finds damaged, goes step by step.

Cost: two windows of memory, three for a moment while a batch of the last one is still held;
scratch memory of a chunk, or of a run of neighbours, a thread. Threads, not processes: reading,
checksums and copies release the GIL.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import DamagedError
from actcache.store.int8_reader import Int8Reader
from actcache.store.shard import ShardReader, scratch
from saetrain.stream.aligned import AnySegment, row_map, stored
from saetrain.stream.hot import Chunk, fill, scatter
from saetrain.stream.order import Window
from saetrain.stream.rows import EligibleRows

_SHARDS = 512  # readers kept with their shard index
_OPEN_FILES = 64  # of them kept open: processes are often allowed 1,024, on a Mac 256
_LINE = 64  # bytes of a cache line
_SPARE = 3  # window buffers kept for reuse
_SHARES = 4  # pieces of a window for each rank, at least
_TOGETHER = 4  # units that a thread takes at once: few, so that threads end together
_RUN_BYTES = 4 << 20  # of neighbouring chunks that are read at once
Unit = tuple[int, NDArray[np.int64]]  # segment, rows in it
_Unit = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # segment, rows, destinations
_Target = tuple[str, int, NDArray[Any]]  # hook, part of how it is stored, window
_Run = tuple[int, int, int]  # first and end of rows, chunk they are in


@dataclass(frozen=True)
class Places:
    """Where the rows of a window come from, in the order in which they are handed out."""

    window: Window
    at: NDArray[np.int64]  # (n,) place in the window of each of this rank's rows, ascending
    segment: NDArray[np.int32]  # (n,) index into the segments
    row: NDArray[np.int32]  # (n,) in the segment
    units: list[_Unit]

    def __len__(self) -> int:
        return len(self.at)

    def between(self, first: int, end: int) -> slice:
        """This rank's rows among rows [first, end) of the epoch."""
        start = self.window.first
        lo, hi = np.searchsorted(self.at, [first - start, end - start])
        return slice(int(lo), int(hi))


def places(window: Window, eligible: EligibleRows, rank: int, world: int) -> Places:
    """The plan of one window. A unit belongs to one rank, so every byte is read once in all.

    Few large units, of small stores or of stores joined in different orders, are shared by ranks.
    """
    found = _pieces([eligible.rows(int(u)) for u in window.units], world)
    sizes = np.array([len(rows) for _, rows in found])
    order = window.order()
    to = np.empty(len(order), dtype=np.int64)
    to[order] = np.arange(len(order))
    at = order  # only its length matters below for one rank
    if world == 1:
        at = np.arange(len(order))
    else:
        mine = (np.repeat(np.arange(len(sizes)), sizes) % world == rank)[order]
        at = np.flatnonzero(mine)
        to = (np.cumsum(mine) - 1)[to]
    ends = np.cumsum(sizes)
    segment = np.repeat(np.array([s for s, _ in found], dtype=np.int32), sizes)
    row = np.concatenate([rows for _, rows in found]).astype(np.int32)
    units = [
        (s, rows, to[end - len(rows) : end])
        for i, ((s, rows), end) in enumerate(zip(found, ends.tolist(), strict=True))
        if i % world == rank
    ]
    chosen = order if world == 1 else order[at]
    return Places(window, at, segment[chosen], row[chosen], units)


def _pieces(units: list[Unit], world: int) -> list[Unit]:
    """The units, cut further where there are too few to give each rank about the same."""
    if world == 1 or len(units) >= _SHARES * world:
        return units
    cuts = -(-_SHARES * world // len(units))
    return [(s, part) for s, rows in units for part in np.array_split(rows, cuts) if len(part)]


@dataclass(frozen=True)
class Loaded:
    """Rows of a window, shuffled, in storage type."""

    places: Places
    acts: dict[str, Tensor]  # hook -> (n, d); int8 codes where there are scales
    scales: dict[str, Tensor]  # hook -> (n, 1) float32, of hooks stored as int8


class Loader:
    """Fills windows. `load` may run in a thread of its own while earlier windows are in use."""

    def __init__(
        self,
        segments: Sequence[AnySegment],
        hooks: Sequence[str],
        *,
        threads: int,
        pin: bool,
        direct: bool = False,
    ) -> None:
        """`pin`: window buffers in page-locked memory, for copies to a GPU.

        `direct`: read past the page cache, see `ShardReader.open`.
        """
        self._segments, self._hooks, self._threads = segments, tuple(hooks), threads
        self._ring = _Ring(pin)
        self._pool = ThreadPoolExecutor(threads, "read")
        self._scratch = threading.local()
        self._reader = lru_cache(maxsize=_SHARDS)(self._open)
        self._file = lru_cache(maxsize=_OPEN_FILES)(
            lambda s, h, i: self._reader(s, h)[i].open(direct)
        )
        self.bytes_read = 0

    def close(self) -> None:
        """Stop the reading threads; errors of unread windows are dropped with them."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._file.cache_clear()

    def load(self, plan: Places) -> Loaded:
        """Read the rows. Raises DamagedError naming segment, hook and chunk."""
        acts, scales = dict[str, Tensor](), dict[str, Tensor]()
        targets: list[_Target] = []
        for hook in self._hooks:
            for part, reader in enumerate(self._reader(0, hook)):
                key = hook if part == 0 else f"{hook} scales"
                rows = self._ring.rows(key, (len(plan), reader.d), reader.dtype)
                (scales if part else acts)[hook] = _tensor(rows)
                targets.append((hook, part, rows))
        groups = [plan.units[i : i + _TOGETHER] for i in range(0, len(plan.units), _TOGETHER)]
        self._in_threads(lambda group: self._fill(group, targets), groups)
        return Loaded(plan, acts, scales)

    def _open(self, segment: int, hook: str) -> tuple[ShardReader, ...]:
        """The shards that hold a hook's rows: one, or codes and scales."""
        reader = stored(self._segments[segment], hook)
        if not isinstance(reader, Int8Reader):
            return (reader,)
        first = stored(self._segments[0], hook)
        assert isinstance(first, Int8Reader)
        if reader.calibration.digest != first.calibration.digest:
            raise DamagedError(
                f"{reader.what}: its int8 calibration differs from that of the first segment"
            )
        return reader.codes, reader.scales

    def _in_threads(self, do: Callable[[Any], None], work: Sequence[Any]) -> None:
        """`do` every item; each thread takes the next one that is left."""
        ticket = itertools.count()

        def some() -> None:
            while (i := next(ticket)) < len(work):
                do(work[i])

        for future in [self._pool.submit(some) for _ in range(min(self._threads, len(work)))]:
            future.result()

    def _fill(self, group: Sequence[_Unit], targets: Sequence[_Target]) -> None:
        """Some units: those of one whole chunk each at once, the others one by one."""
        for target in targets:
            hook, part, window = target
            plain, others = list[tuple[Chunk, _Unit]](), list[_Unit]()
            for unit in group:
                chunk = self._one_chunk(unit, hook, part)
                others.append(unit) if chunk is None else plain.append((chunk, unit))
            if plain:
                reader = self._reader(0, hook)[part]
                memory = self._buffer(reader.chunk_bytes + 4)
                done = fill(window, [c for c, _ in plain], reader.chunk_rows, memory)
                self.bytes_read += done * reader.chunk_bytes
                others += [unit for _, unit in plain[done:]]
            for unit in others:
                self._fill_unit(unit, target)

    def _one_chunk(self, unit: _Unit, hook: str, part: int) -> Chunk | None:
        """The unit as one chunk of a plain file; None if it is anything else."""
        s, rows, at = unit
        reader, file = self._reader(s, hook)[part], self._file(s, hook, part)
        n = reader.chunk_rows
        chunk, last = int(rows[0]) // n, int(rows[-1]) // n
        alike = n == self._reader(0, hook)[part].chunk_rows and chunk == last
        if file is None or file.direct or not alike:
            return None
        if row_map(self._segments[s], hook) is not None:
            return None
        which = None if len(rows) == n else rows - chunk * n
        return Chunk(file, reader.place(chunk)[0], at, which)

    def _fill_unit(self, unit: _Unit, target: _Target) -> None:
        """One unit, step by step; says what is wrong with it."""
        s, rows, to = unit
        hook, part, window = target
        reader, file = self._reader(s, hook)[part], self._file(s, hook, part)
        there, at = self._there(s, hook, rows, to)
        runs = _runs(there, reader.chunk_rows)
        for some in _neighbours(runs, _RUN_BYTES // reader.chunk_bytes):
            chunks = range(some[0][2], some[-1][2] + 1)
            memory = self._buffer(len(chunks) * (reader.chunk_bytes + 4))
            blocks = reader.read_run(chunks, memory, file)
            self.bytes_read += len(chunks) * reader.chunk_bytes
            for (lo, hi, chunk), block in zip(some, blocks, strict=True):
                chosen = there[lo:hi] - chunk * reader.chunk_rows
                scatter(window, at[lo:hi], block, None if hi - lo == len(block) else chosen)

    def _there(
        self, s: int, hook: str, rows: NDArray[np.int64], to: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows in the hook's own store, ascending, and their destinations."""
        place = row_map(self._segments[s], hook)
        if place is None:
            return rows, to
        there = place[rows].astype(np.int64)
        order = np.argsort(there)
        return there[order], to[order]

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        """Memory of this thread for a chunk of `size` bytes."""
        known: tuple[int, NDArray[np.uint8]] = getattr(
            self._scratch, "chunk", (0, np.empty(0, "u1"))
        )
        if known[0] < size:
            known = self._scratch.chunk = size, scratch(size)
        return known[1]


def _runs(rows: NDArray[np.int64], chunk_rows: int) -> list[_Run]:
    """(first, end, chunk) of each run of ascending `rows` that lies in one chunk."""
    first, last = int(rows[0]) // chunk_rows, int(rows[-1]) // chunk_rows
    if first == last:
        return [(0, len(rows), first)]
    chunks = np.arange(first, last + 2)
    cuts = np.searchsorted(rows, chunks * chunk_rows).tolist()
    runs = zip(cuts[:-1], cuts[1:], chunks.tolist(), strict=False)
    return [(lo, hi, chunk) for lo, hi, chunk in runs if hi > lo]


def _neighbours(runs: list[_Run], most: int) -> Iterator[list[_Run]]:
    """The runs in groups of neighbouring chunks, to be read at once; `most` of them at a time."""
    group = runs[:1]
    for run in runs[1:]:
        if run[2] == group[-1][2] + 1 and len(group) < most:
            group.append(run)
        else:
            yield group
            group = [run]
    yield group


class _Ring:
    """Window buffers by hook, handed out again once nobody refers to their memory."""

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._buffers: dict[str, list[NDArray[np.uint8]]] = {}

    def rows(self, hook: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        size = shape[0] * shape[1] * dtype.itemsize
        buffers = self._buffers.setdefault(hook, [])
        for i in range(len(buffers)):
            if _unused(buffers, i) and len(buffers[i]) >= size + _LINE:
                return _aligned(buffers[i], size).view(dtype).reshape(shape)
        # Too small or in use: the list gives up what is free, users keep what they hold.
        buffers[:] = [b for i, b in enumerate(buffers) if not _unused(buffers, i)][-_SPARE + 1 :]
        buffers.append(self._new(size + size // 8 + _LINE))
        return _aligned(buffers[-1], size).view(dtype).reshape(shape)

    def _new(self, size: int) -> NDArray[np.uint8]:
        fresh: NDArray[np.uint8]
        if self._pin:
            fresh = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            fresh = np.empty(size, dtype=np.uint8)
        return fresh


def _aligned(buffer: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """So many bytes of it, from the beginning of a cache line on."""
    first = -buffer.ctypes.data % _LINE
    return buffer[first : first + size]


def _unused(buffers: list[NDArray[np.uint8]], i: int) -> bool:
    """Whether the list holds the only reference: slices of tensors keep their array alive."""
    return sys.getrefcount(buffers[i]) <= 2  # the list's, and the argument of this call


def _tensor(x: NDArray[Any]) -> Tensor:
    """Rows as a tensor on the same memory, bfloat16 included."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
