"""A single pass over a stream, kept in memory for whoever makes the same pass again.

Jobs of a group evaluate on the same held-out rows, one after the other, and each does so twice (the
SAE, the PCA beside it). Several streams draw on one purse of bytes; what exceeds it is read anew by
every pass. An error ends the pass and is met again by the next one: nothing is cut short. Only a
stream that is kept whole (`keep_all`) may be passed over by several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saetrain.runs import BatchStream
from saetrain.saes.base import HookSpace
from saetrain.stream import Batch


@dataclass
class Purse:
    """Bytes that are left to keep rows in."""

    left: int


class Kept:
    """A stream whose `one_pass` is kept; used like the stream itself."""

    def __init__(self, stream: BatchStream, purse: Purse) -> None:
        self._stream, self._purse = stream, purse
        self._known: list[Batch] = []
        self._rest: Iterator[Batch] | None = None  # None: not begun
        self._full = False  # it does not fit
        self._whole = False  # all of it is known

    @property
    def n_rows(self) -> int | None:
        return self._stream.n_rows

    @property
    def batches_per_epoch(self) -> int | None:
        return self._stream.batches_per_epoch

    def space(self, hook: str) -> HookSpace:
        return self._stream.space(hook)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._stream)

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def one_pass(self) -> Iterator[Batch]:
        """As the stream's own; only as far as it is asked for is read."""
        at = 0
        while not self._full:
            if at == len(self._known) and (self._whole or not self._read()):
                if self._full:
                    break
                return
            yield self._known[at]
            at += 1
        for i, batch in enumerate(self._stream.one_pass()):
            if i >= at:
                yield batch

    def keep_all(self, row_bytes: int) -> bool:
        """Read all of it, rows of `row_bytes`, if it is certain to fit; whether it is all kept."""
        n = self.n_rows
        room = self._purse.left + sum(map(_bytes, self._known))
        while n is not None and n * row_bytes <= room and not (self._whole or self._full):
            self._read()
        return self._whole

    def forget(self) -> None:
        """Give the memory back."""
        self._purse.left += sum(map(_bytes, self._known))
        self._known, self._rest, self._whole = [], None, False

    def _read(self) -> bool:
        """Keep another batch. False at the end, or if there is no room for it."""
        if self._rest is None:
            self._rest = self._stream.one_pass()
        try:
            batch = next(self._rest, None)
        except BaseException:
            self.forget()
            raise
        if batch is None:
            self._whole = True
            return False
        if _bytes(batch) > self._purse.left:
            self._full = True
            self.forget()
            return False
        self._purse.left -= _bytes(batch)
        self._known.append(batch)
        return True


def _bytes(batch: Batch) -> int:
    return sum(x.numel() * x.element_size() for x in batch.acts.values())
