"""Batches onto the training device in storage type, one ahead of their use, and decoded there.

On CUDA the copy of the next batch runs on a stream of its own while the current one is trained on;
page-locked windows make it asynchronous. A batch is yielded once the training stream was told to
wait for its copy. On other devices the copy is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.stream.batch import Batch

Stored = dict[str, tuple[Tensor, ...]]  # hook -> rows (n, d), and scales (n, 1) of int8 codes
Decode = Callable[[str, tuple[Tensor, ...]], Tensor]


def cat(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, on the CPU; of a single one without a copy.

    Copied by this thread alone: torch.cat would wake a team of threads, which then spin on the
    cores that the reading threads need (a quarter of the stream's time on two cores).
    """
    if len(parts) == 1:
        return parts[0]
    out = torch.empty(sum(len(p) for p in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
    first = 0
    for part in parts:
        _bytes(out[first : first + len(part)])[:] = _bytes(part)
        first += len(part)
    return out


def _bytes(rows: Tensor) -> NDArray[np.uint8]:
    """The same memory; bfloat16 has no type in numpy."""
    return rows.view(torch.uint8).numpy()


def to_device(
    batches: Iterator[tuple[Batch, Stored]], device: torch.device, decode: Decode
) -> Iterator[Batch]:
    """The batches, with what `decode` makes of their stored rows on `device` as `acts`."""

    def moved(stored: Stored) -> Stored:
        return {h: tuple(x.to(device, non_blocking=True) for x in p) for h, p in stored.items()}

    def whole(batch: Batch, stored: Stored) -> Batch:
        return replace(batch, acts={h: decode(h, parts) for h, parts in stored.items()})

    if device.type == "cuda":
        yield from _ahead(batches, device, moved, whole)
        return
    for batch, stored in batches:
        yield whole(batch, stored if device.type == "cpu" else moved(stored))


def _ahead(
    batches: Iterator[tuple[Batch, Stored]],
    device: torch.device,
    moved: Callable[[Stored], Stored],
    whole: Callable[[Batch, Stored], Batch],
) -> Iterator[Batch]:
    side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Batch, Stored, Stored, Any] | None = None
    for batch, stored in batches:
        with torch.cuda.stream(side):
            copies = moved(stored)
            copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(side)
        if waiting is not None:
            yield _ready(waiting, whole)
        waiting = (batch, stored, copies, copied)
    if waiting is not None:
        yield _ready(waiting, whole)


def _ready(
    waiting: tuple[Batch, Stored, Stored, Any], whole: Callable[[Batch, Stored], Batch]
) -> Batch:
    """The decoded copy. `waiting` holds the host's memory until it has been read."""
    batch, _, copies, copied = waiting
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for x in (x for parts in copies.values() for x in parts):
        x.record_stream(current)
    copied.synchronize()  # of a copy begun one batch ago: rarely waits
    return whole(batch, copies)
