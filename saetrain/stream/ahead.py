"""Windows read ahead, and cut into batches.

One window is read, and the plan of the next is made, while one is in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from saetrain.stream.loader import Loaded, Loader, Places
from saetrain.stream.order import Window

T = TypeVar("T")
R = TypeVar("R")


def changes(then: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> list[str]:
    """A sentence for each entry of `now` that was another one `then`; `of` names whose it is."""
    return [f"{k}{of}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v]


@dataclass
class Traffic:
    """What a stream has done since it was made. GB are 1e9 bytes."""

    bytes: int = 0  # of chunks read
    rows: int = 0  # handed out
    waited: float = 0.0  # seconds that the consumer waited for a window
    seconds: float = 0.0  # since the first batch was asked for

    def to_json(self) -> dict[str, float]:
        """Rates, and the share of time that training waited."""
        seconds = max(self.seconds, 1e-9)
        return {
            "gb_per_s": self.bytes / seconds / 1e9,
            "rows_per_s": self.rows / seconds,
            "wait_share": self.waited / seconds,
        }


def read_ahead(
    loader: Loader,
    plan: Iterator[tuple[int, Window]],
    places: Callable[[Window], Places],
    traffic: Traffic,
) -> Iterator[tuple[int, Loaded]]:
    """The windows of `plan`, (epoch, window) each, loaded in order; `loader` is closed at the end.

    `places` says where the rows of a window come from; `traffic` is kept up to date.
    """
    begun, before = time.perf_counter(), (traffic.seconds, traffic.bytes)
    with ThreadPoolExecutor(2, "window") as ahead:
        try:
            # The plan of a window is made while the one before it is read.
            epoch, planned = _plan(ahead, plan, places)
            reading = _submit(ahead, loader.load, _result(planned))
            while reading is not None:
                following, planned = _plan(ahead, plan, places)
                asked = time.perf_counter()
                loaded = reading.result()
                traffic.waited += time.perf_counter() - asked
                traffic.seconds = before[0] + time.perf_counter() - begun
                traffic.bytes = before[1] + loader.bytes_read
                reading = _submit(ahead, loader.load, _result(planned))
                yield epoch, loaded
                del loaded
                epoch = following
        finally:
            ahead.shutdown(wait=True, cancel_futures=True)
            loader.close()


def _plan(
    ahead: ThreadPoolExecutor,
    plan: Iterator[tuple[int, Window]],
    places: Callable[[Window], Places],
) -> tuple[int, Future[Places] | None]:
    epoch, window = next(plan, (-1, None))
    return epoch, _submit(ahead, places, window)


def _submit(pool: ThreadPoolExecutor, do: Callable[[T], R], work: T | None) -> Future[R] | None:
    return None if work is None else pool.submit(do, work)


def _result(future: Future[T] | None) -> T | None:
    return None if future is None else future.result()


def cut(
    windows: Iterator[tuple[int, Loaded]],
    step: int,
    steps: int,
    bound: Callable[[int], int],
    make: Callable[[Sequence[Loaded], int, int, int, int], T],
) -> Iterator[T]:
    """Batches from `step` on of epochs of `steps` batches; s is what `bound(s)`, `bound(s+1)` hold.

    `make(windows, first, end, epoch, number over all epochs)`; not called for empty batches.
    """
    held: list[Loaded] = []
    now = -1
    for epoch, loaded in windows:
        if epoch != now and now >= 0:
            held, step = [], 0
        now = epoch
        held.append(loaded)
        known = _end(loaded)
        while step < steps and bound(step + 1) <= known:
            first, last = bound(step), bound(step + 1)
            if last > first:
                yield make(held, first, last, epoch, epoch * steps + step)
            step += 1
            held = [h for h in held if _end(h) > last]
        del loaded


def _end(loaded: Loaded) -> int:
    window = loaded.places.window
    return window.first + window.n_rows
