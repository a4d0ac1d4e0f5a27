"""Shuffled batches of activations from a snapshot, in bounded memory, the same on every run.

Inner chunks of all segments are visited in a keyed random order; a window of chunks is read, its
rows are shuffled and cut into batches, the rest goes on into the next window. So the rows of an
epoch form one fixed sequence, a function of (snapshot, seed, epoch), and batch `step` is its rows
[step * B, (step + 1) * B): a stream stopped anywhere resumes by arithmetic.

Bias: two rows can share a batch only if their chunks share a window. Stores are permuted within a
segment at writing time, so a chunk holds few tokens of any one context and this hardly matters;
for `order: context` stores make `window_rows` large. Cost: one window of rows in memory, and the
token tables of the segments in it. Rows left over at the end of an epoch (< B) are dropped.

Reading is synchronous here; nothing about order or state depends on that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import FLAG_SPECIAL, Snapshot, TokenTable
from actcache.store.split import held_out, splitmix64
from saetrain.errors import ConfigError
from saetrain.saes.base import HookSpace

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Batch:
    """Row-aligned activations of one or several hooks, and where the rows come from."""

    acts: dict[str, Tensor]  # hook -> (B, d)
    tokens: TokenTable  # of the same rows
    segment: NDArray[np.int32]  # (B,) index into snapshot.segments
    epoch: int
    step: int  # counts over epochs


@dataclass(frozen=True)
class _Rows:
    """Rows read from the store and not yet handed out, in storage type."""

    acts: dict[str, NDArray[Any]]
    tokens: TokenTable
    segment: NDArray[np.int32]

    def take(self, rows: NDArray[np.int64] | slice) -> _Rows:
        acts = {hook: x[rows] for hook, x in self.acts.items()}
        return _Rows(acts, self.tokens.take(rows), self.segment[rows])

    def __len__(self) -> int:
        return len(self.segment)


class Stream:
    """Iterate to get shuffled batches without end; `one_pass` reads every row once, in order."""

    def __init__(
        self,
        snapshot: Snapshot,
        hooks: Sequence[str],
        *,
        batch_tokens: int = 4096,
        seed: int = 0,
        split: Split = "train",
        held_out_fraction: float = 0.05,
        skip_special: bool = True,
        window_rows: int = 65_536,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Reads the token tables to count eligible rows; no activations yet.

        Raises HookMissingError for a hook the store has not, ConfigError if fewer rows than one
        batch are eligible.
        """
        self.snapshot = snapshot
        self.hooks = tuple(snapshot.resolve_hook(h) for h in hooks)
        self.batch_tokens, self.seed, self.split = batch_tokens, seed, split
        self.held_out_fraction, self.skip_special = held_out_fraction, skip_special
        self.window_rows, self.dtype, self.device = window_rows, dtype, torch.device(device)
        self.epoch, self.step_in_epoch = 0, 0
        self._tokens = lru_cache(maxsize=64)(self._read_tokens)
        self._chunk_of, self._eligible = self._count()
        self.n_rows = int(self._eligible.sum())
        self.batches_per_epoch = self.n_rows // batch_tokens

    # -- what the stream knows ---------------------------------------------------------------------

    def space(self, hook: str) -> HookSpace:
        """Width and statistics of a hook, from the store's commits."""
        stats = self.snapshot.stats(hook)
        return HookSpace(
            name=hook,
            d=len(stats.mean),
            mean=torch.from_numpy(stats.mean.astype(np.float32)),
            mean_norm=stats.mean_norm,
            variance=stats.variance,
        )

    def state_dict(self) -> dict[str, Any]:
        """A few integers and names; enough to continue with exactly the next batch."""
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "store_id": self.snapshot.store_id,
            "snapshot": self.snapshot.name,
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "n_rows": self.n_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. ConfigError if this stream would give other batches."""
        mine = self.state_dict()
        fixed = ("store_id", "snapshot", "seed", "batch_tokens", "n_rows")
        wrong = [
            f"{k}: {state.get(k)} then, {mine[k]} now" for k in fixed if state.get(k) != mine[k]
        ]
        if wrong:
            raise ConfigError(f"cannot resume the stream, it changed: {'; '.join(wrong)}")
        self.epoch, self.step_in_epoch = int(state["epoch"]), int(state["step_in_epoch"])

    # -- batches -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Shuffled batches from the current state on, epoch after epoch, without end."""
        if self.batches_per_epoch == 0:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens:,} is more than the {self.n_rows:,} rows of the "
                f"{self.split} split; lower batch_tokens or cache more tokens"
            )
        while True:
            for rows in self._cut(self._windows(self.epoch), self.step_in_epoch):
                step = self.epoch * self.batches_per_epoch + self.step_in_epoch
                batch = self._batch(rows, self.epoch, step)
                self.step_in_epoch += 1
                yield batch
                if self.step_in_epoch == self.batches_per_epoch:
                    break
            self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def one_pass(self) -> Iterator[Batch]:
        """Every eligible row once, in stored order; the last batch may be short."""
        waiting: list[_Rows] = []
        step = 0
        for chunk in range(len(self._eligible)):
            waiting.append(self._read_chunks([chunk]))
            while sum(map(len, waiting)) >= self.batch_tokens:
                rows = _concat(waiting)
                yield self._batch(rows.take(slice(self.batch_tokens)), 0, step)
                waiting, step = [rows.take(slice(self.batch_tokens, None))], step + 1
        rest = _concat(waiting)
        if len(rest):
            yield self._batch(rest, 0, step)

    def _cut(self, windows: Iterator[tuple[int, _Rows]], first: int) -> Iterator[_Rows]:
        """Batches number first, first + 1, ... of the sequence that the windows make up."""
        waiting: _Rows | None = None
        skip = first * self.batch_tokens
        for start, window in windows:
            if skip > start:
                window = window.take(slice(skip - start, None))
            rows = window if waiting is None else _concat([waiting, window])
            full = len(rows) // self.batch_tokens
            for i in range(full):
                yield rows.take(slice(i * self.batch_tokens, (i + 1) * self.batch_tokens))
            waiting = rows.take(slice(full * self.batch_tokens, None))

    def _windows(self, epoch: int) -> Iterator[tuple[int, _Rows]]:
        """(number of its first row in the epoch, shuffled rows) of each window still needed."""
        skip = self.step_in_epoch * self.batch_tokens
        order = _shuffle(len(self._eligible), f"{self.seed}/{epoch}")
        start, size, number, group = 0, 0, 0, list[int]()
        for position, chunk in enumerate(order):
            group.append(int(chunk))
            size += int(self._eligible[chunk])
            if size < self.window_rows and position + 1 < len(order):
                continue
            if start + size > skip:
                rows = self._read_chunks(group)
                yield start, rows.take(_shuffle(size, f"{self.seed}/{epoch}/{number}"))
            start, size, number, group = start + size, 0, number + 1, []

    def _batch(self, rows: _Rows, epoch: int, step: int) -> Batch:
        acts = {h: _tensor(x).to(self.device, self.dtype) for h, x in rows.acts.items()}
        return Batch(acts, rows.tokens, rows.segment, epoch, step)

    # -- reading -----------------------------------------------------------------------------------

    def _read_tokens(self, segment: int) -> tuple[TokenTable, NDArray[np.bool_]]:
        """Token table of a segment and which of its rows are eligible."""
        tokens = self.snapshot.segments[segment].tokens()
        keep = np.ones(len(tokens), dtype=bool)
        if self.skip_special:
            keep &= (tokens.flags & FLAG_SPECIAL) == 0
        if self.split != "all":
            keep &= held_out(tokens.doc, self.held_out_fraction) == (self.split == "held_out")
        return tokens, keep

    def _count(self) -> tuple[list[tuple[int, int, int]], NDArray[np.int64]]:
        """All chunks as (segment, first row, end row), and the eligible rows of each."""
        chunks, eligible = [], []
        for s, segment in enumerate(self.snapshot.segments):
            step = min(segment.hooks[h].chunk_rows for h in self.hooks)
            keep = self._tokens(s)[1]
            for first in range(0, segment.n_rows, step):
                end = min(first + step, segment.n_rows)
                chunks.append((s, first, end))
                eligible.append(int(np.count_nonzero(keep[first:end])))
        return chunks, np.asarray(eligible, dtype=np.int64)

    def _read_chunks(self, chunks: Sequence[int]) -> _Rows:
        parts = []
        for s, first, end in (self._chunk_of[c] for c in chunks):
            tokens, keep = self._tokens(s)
            rows = first + np.flatnonzero(keep[first:end])
            acts = {h: self._read_rows(s, h, rows) for h in self.hooks}
            parts.append(_Rows(acts, tokens.take(rows), np.full(len(rows), s, dtype=np.int32)))
        return _concat(parts)

    def _read_rows(self, segment: int, hook: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Chosen rows of a hook; hooks of other widths have other chunk sizes."""
        reader = self.snapshot.segments[segment].acts(hook)
        if not len(rows):
            return np.empty((0, reader.d), dtype=reader.dtype)
        number = rows // reader.chunk_rows
        parts = [
            reader.read_chunk(int(c))[rows[number == c] - c * reader.chunk_rows]
            for c in np.unique(number)
        ]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _concat(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    acts = {h: np.concatenate([p.acts[h] for p in parts]) for h in parts[0].acts}
    columns = zip(*(vars(p.tokens).values() for p in parts), strict=True)
    tokens = TokenTable(*(np.concatenate(c) for c in columns))
    return _Rows(acts, tokens, np.concatenate([p.segment for p in parts]))


def _shuffle(n: int, key: str) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on `key` alone."""
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], dtype="<u8")
    with np.errstate(over="ignore"):
        ranks = splitmix64(np.arange(n, dtype=np.uint64) + seed)
    return np.argsort(ranks, kind="stable")


def _tensor(x: NDArray[Any]) -> Tensor:
    """A numpy array of rows as a tensor of the same type, bfloat16 included."""
    x = np.ascontiguousarray(x)
    if not x.flags.writeable:
        x = x.copy()
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)
