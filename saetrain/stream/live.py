"""Shuffled batches of activations that are captured while training: a stream without a store.

Segments come from a capture (`actcache.live`) one after the other, their units fill a window, the
window is shuffled and cut into batches, all by the rules and keys of `Stream(shuffle=False)`: over
the store of the same settings that gives the same batches. While one window is in use the next is
captured in a thread.

Bias: rows are mixed within a window only, so `window_rows` of one segment or more is worth its
memory. How long an epoch is shows when the data has ended; until then `n_rows` and
`batches_per_epoch` are None. Statistics are those of the first `calibration_tokens` rows, captured
before training; the segments among them that fit `keep_bytes` are not captured again.

Cost: two windows and two segments in memory. State is constant in size: resuming captures the
window again that the next batch lies in, nothing before it. One process only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import TokenTable
from actcache.store.layout import Modality
from saetrain.errors import ConfigError
from saetrain.saes.base import HookSpace
from saetrain.stream.ahead import Traffic, changes
from saetrain.stream.batch import Batch
from saetrain.stream.capture import Calibration, Capture, LiveSegment
from saetrain.stream.device import Stored, cat, to_device
from saetrain.stream.loader import _tensor
from saetrain.stream.mixing import of_rows
from saetrain.stream.order import shuffled
from saetrain.stream.rows import RowFilter, Split


@dataclass(frozen=True)
class _Origin:
    """Where a window begins."""

    place: Mapping[str, int] | None  # of its first segment; None: the start of the data
    row: int = 0  # first row of that segment that is not in the window before
    number: int = 0  # in the epoch
    first: int = 0  # rows of the epoch before it


@dataclass(frozen=True)
class _Window:
    """Rows of one window, shuffled."""

    origin: _Origin
    after: _Origin
    epoch: int
    acts: dict[str, Tensor]
    table: TokenTable
    segment: NDArray[np.int32]

    @property
    def end(self) -> int:
        return self.origin.first + len(self.segment)


@dataclass(frozen=True)
class _Part:
    """Eligible rows of one unit."""

    number: int  # of the segment
    segment: LiveSegment
    rows: NDArray[np.int64]  # into the arrays of `segment`

    @property
    def next_row(self) -> int:
        return int(self.segment.row[self.rows[-1]]) + 1


class LiveStream:
    """Iterate to get shuffled batches without end; `one_pass` captures every row once, in order."""

    def __init__(
        self,
        capture: Capture,
        hooks: Sequence[str],
        calibration: Calibration,
        *,
        batch_tokens: int = 4096,
        seed: int = 0,
        split: Split = "train",
        held_out_fraction: float = 0.05,
        skip_special: bool = True,
        modality: Modality = "all",
        roles: Sequence[str] | None = None,
        window_rows: int = 65_536,
        run_chunks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Captures nothing yet. ConfigError for numbers that cannot work; other settings as Stream.

        `hooks` are names as stored.
        """
        self.capture, self.hooks, self._calibration = capture, tuple(hooks), calibration
        self.batch_tokens, self.seed = batch_tokens, seed
        self.window_rows, self.run_chunks = window_rows, run_chunks
        self.dtype, self.device = dtype, torch.device(device)
        for name in ("batch_tokens", "window_rows", "run_chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        self.filter = RowFilter(
            split=split,
            held_out_fraction=held_out_fraction,
            skip_special=skip_special,
            modality=modality,
            roles=None if roles is None else tuple(roles),
        )
        self.epoch, self.step_in_epoch, self.step = 0, 0, 0
        self.traffic = Traffic()
        self.mixing: dict[str, float] | None = None  # of the first window, see mixing.of_rows
        self.n_rows: int | None = None  # of an epoch, once one has ended
        self._origin = _Origin(None)  # of the window that the next batch begins in

    @property
    def batches_per_epoch(self) -> int | None:
        """None until the data has ended once."""
        return None if self.n_rows is None else self.n_rows // self.batch_tokens

    def space(self, hook: str) -> HookSpace:
        """Width and statistics of a hook, from the calibration rows."""
        return HookSpace.of(hook, self._calibration.of(hook))

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A few integers and names; enough to continue with exactly the next batch."""
        at = self._origin
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "place": None if at.place is None else dict(at.place),
            "window": [at.row, at.number, at.first],
            "mixing": self.mixing,
            "ids": self.capture.ids(),
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "window_rows": self.window_rows,
            "run_chunks": self.run_chunks,
            "filter": self.filter.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. ConfigError if this stream would give other batches."""
        fixed = ("ids", "seed", "batch_tokens", "window_rows", "run_chunks", "filter")
        mine = self.state_dict()
        if wrong := changes(state, {k: mine[k] for k in fixed}):
            raise ConfigError(f"cannot resume the live stream, it changed: {'; '.join(wrong)}")
        self.epoch, self.step_in_epoch = int(state["epoch"]), int(state["step_in_epoch"])
        self.step = int(state["step"])
        row, number, first = (int(n) for n in state["window"])
        self._origin = _Origin(state["place"], row, number, first)
        self.mixing = state["mixing"]

    # -- batches -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Shuffled batches from the current state on; when the data ends it begins again."""
        origins: list[tuple[int, int, _Origin]] = []  # (epoch, step in it, origin) not yet out
        for batch in to_device(self._batches(origins), self.device, self._decode):
            self.epoch, self.step_in_epoch, self._origin = origins.pop(0)
            self.step = batch.step + 1
            yield batch

    def one_pass(self) -> Iterator[Batch]:
        """Every eligible row once, in stored order; the last batch may be short."""
        windows = self._epoch(0, _Origin(None), shuffle=False, counted=False)
        yield from to_device(self._one_pass(windows), self.device, self._decode)

    def _one_pass(self, windows: Iterator[_Window]) -> Iterator[tuple[Batch, Stored]]:
        held, first, step = list[_Window](), 0, 0
        for window in windows:
            held.append(window)
            while first + self.batch_tokens <= window.end:
                yield self._batch(held, first, first + self.batch_tokens, 0, step)
                first, step = first + self.batch_tokens, step + 1
                held = [w for w in held if w.end > first]
        if held and held[-1].end > first:
            yield self._batch(held, first, held[-1].end, 0, step)

    def _batches(self, origins: list[tuple[int, int, _Origin]]) -> Iterator[tuple[Batch, Stored]]:
        """Batches without end; `origins` gets what the state is after each."""
        epoch, step, total, origin = self.epoch, self.step_in_epoch, self.step, self._origin
        b = self.batch_tokens
        while True:
            held = list[_Window]()
            for window in self._epoch(epoch, origin, shuffle=True, counted=True):
                self._mix(window)
                held.append(window)
                while (step + 1) * b <= window.end:
                    done = (step + 1) * b
                    made = self._batch(held, step * b, done, epoch, total)
                    held = [w for w in held if w.end > done]
                    origins.append((epoch, step + 1, held[0].origin if held else window.after))
                    yield made
                    step, total = step + 1, total + 1
                del window
            if step == 0:
                raise ConfigError(
                    f"batch_tokens={b:,} is more than the rows of the {self.filter.split} split "
                    "that live.data gives; lower batch_tokens or give more data"
                )
            epoch, step, origin = epoch + 1, 0, _Origin(None)

    def _batch(
        self, held: Sequence[_Window], first: int, last: int, epoch: int, step: int
    ) -> tuple[Batch, Stored]:
        cuts = [
            (w, slice(max(0, first - w.origin.first), min(last, w.end) - w.origin.first))
            for w in held
        ]
        stored: Stored = {h: (cat([w.acts[h][c] for w, c in cuts]),) for h in self.hooks}
        columns = zip(*(vars(w.table.take(c)).values() for w, c in cuts), strict=True)
        table = TokenTable(*(np.concatenate(c) for c in columns))
        segment = np.concatenate([w.segment[c] for w, c in cuts])
        self.traffic.rows += len(segment)
        return Batch({}, table, segment, epoch, step), stored

    def _decode(self, hook: str, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0].to(self.dtype)

    def _mix(self, window: _Window) -> None:
        """κ of the first window that is seen, if it holds a batch."""
        if self.mixing is None and len(window.segment) >= self.batch_tokens:
            ids = window.segment.astype(np.int64) << 32 | window.table.ctx
            self.mixing = of_rows(ids, window.table.doc, self.batch_tokens)

    # -- windows -----------------------------------------------------------------------------------

    def _epoch(
        self, epoch: int, origin: _Origin, *, shuffle: bool, counted: bool
    ) -> Iterator[_Window]:
        """The windows of one pass over the data, each captured while the one before is in use."""
        stop = threading.Event()
        windows = self._windows(epoch, origin, stop, shuffle)
        # The capturing thread computes with as many threads as this one would.
        options: dict[str, Any] = {
            "initializer": torch.set_num_threads,
            "initargs": (torch.get_num_threads(),),
        }
        begun, end = time.perf_counter(), origin.first
        with ThreadPoolExecutor(1, "capture", **options) as pool:
            try:
                take = partial(next, windows, None)
                coming = pool.submit(take)
                while True:
                    asked = time.perf_counter()
                    window = coming.result()
                    self.traffic.waited += time.perf_counter() - asked
                    self.traffic.seconds += time.perf_counter() - begun
                    begun = time.perf_counter()
                    if window is None:
                        break
                    coming, end = pool.submit(take), window.end
                    yield window
                    del window
            finally:
                stop.set()
        if counted:
            self.n_rows = end

    def _windows(
        self, epoch: int, origin: _Origin, stop: threading.Event, shuffle: bool
    ) -> Iterator[_Window]:
        parts, rows = list[_Part](), 0
        for part in self._parts(origin, stop):
            parts.append(part)
            rows += len(part.rows)
            if rows >= self.window_rows:
                window = self._window(epoch, origin, parts, rows, shuffle)
                parts, rows, origin = [], 0, window.after
                yield window
        if rows and not stop.is_set():
            yield self._window(epoch, origin, parts, rows, shuffle)

    def _parts(self, origin: _Origin, stop: threading.Event) -> Iterator[_Part]:
        """The units with eligible rows, from `origin` on."""
        infos = self.capture.hooks
        unit = self.run_chunks * max(infos[h].chunk_rows for h in self.hooks)
        begin = origin.row
        for segment in self.capture.segments(origin.place, self.filter.keep, stop):
            keep = self.filter.keep(segment.tokens.flags, segment.tokens.doc)
            self.traffic.bytes += sum(segment.acts[h].nbytes for h in self.hooks)
            rows = np.flatnonzero(keep & (segment.row >= begin))
            units = segment.row[rows] // unit
            for group in np.split(rows, np.flatnonzero(np.diff(units)) + 1):
                if len(group):
                    yield _Part(int(segment.place["number"]), segment, group)
            begin = 0

    def _window(
        self, epoch: int, origin: _Origin, parts: Sequence[_Part], n: int, shuffle: bool
    ) -> _Window:
        key = f"{self.seed}/{epoch}/{origin.number}"
        order = shuffled(n, key) if shuffle else np.arange(n)
        to = np.empty(n, dtype=np.int64)
        to[order] = np.arange(n)
        ends = np.cumsum([len(p.rows) for p in parts]).tolist()
        places = [to[end - len(p.rows) : end] for p, end in zip(parts, ends, strict=True)]
        acts = {}
        for hook in self.hooks:
            some = parts[0].segment.acts[hook]
            window = np.empty((n, some.shape[1]), dtype=some.dtype)
            for p, place in zip(parts, places, strict=True):
                window[place] = p.segment.acts[hook][p.rows]
            acts[hook] = _tensor(window)
        columns = zip(*(vars(p.segment.tokens.take(p.rows)).values() for p in parts), strict=True)
        table = TokenTable(*(np.concatenate(c)[order] for c in columns))
        segment = np.repeat([p.number for p in parts], [len(p.rows) for p in parts])[order]
        last = parts[-1]
        after = _Origin(last.segment.place, last.next_row, origin.number + 1, origin.first + n)
        return _Window(origin, after, epoch, acts, table, segment.astype(np.int32))
