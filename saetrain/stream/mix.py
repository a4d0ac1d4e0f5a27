"""Several streams mixed by weight: every batch holds the right number of rows of each.

Rows are apportioned with their rounding errors carried on (see `apportion`), so after any number of
batches each store is within about a row of its share. A batch's counts need no state but its
number, so a mix resumes by arithmetic; each store's rows come in the order of its own stream, the
same for any number of ranks.

An epoch ends when a store has too few rows for another batch: no row comes twice in it. Larger
stores begin anew then as well, in another order, so which of their rows are left out changes from
epoch to epoch. `one_pass` has all rows of all stores, by weight as long as all of them last.

Inside a batch the rows of a store stand together, in the order of the stores. Cost: the windows of
every stream, and one copy of each batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from actcache.store import TokenTable
from saetrain.errors import ConfigError
from saetrain.saes.base import HookSpace
from saetrain.stream.ahead import Traffic, changes
from saetrain.stream.apportion import Apportion
from saetrain.stream.batch import Batch
from saetrain.stream.sequences import SequenceStream
from saetrain.stream.stream import Stream

_SAME = ("batch_tokens", "rank", "world", "dtype", "device")


class Mix:
    """Streams of the same hooks over several stores, read as one; used like a `Stream`.

    `segment` of a batch numbers the segments of all stores one after the other.
    """

    def __init__(
        self, parts: Sequence[tuple[Stream, float]], *, names: Sequence[str] | None = None
    ) -> None:
        """`parts` are streams with equal batch_tokens, rank, world, dtype and device, and weights.

        Weights are positive and need not add up to 1. `names` are used in messages. Raises
        ConfigError if streams differ in these or in hooks or widths, or cannot fill a batch.
        """
        if len(parts) < 2:
            raise ConfigError(f"mix: expected at least two streams, got {len(parts)}")
        self.names = [str(n) for n in names or range(len(parts))]
        self.streams = [stream for stream, _ in parts]
        self.weights = _shares([weight for _, weight in parts], self.names)
        self._check()
        first = self.streams[0]
        self.hooks, self.batch_tokens = first.hooks, first.batch_tokens
        self.rank, self.world = first.rank, first.world
        shares = Apportion(self.weights, [s.n_rows for s in self.streams])
        self._counts = lru_cache(maxsize=64)(shares)
        self.n_rows = shares.n_rows
        self.batches_per_epoch = shares.together // self.batch_tokens
        self.epoch, self.step_in_epoch = 0, 0
        sizes = [len(s.snapshot.segments) for s in self.streams]
        self._first_segment = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)

    def _check(self) -> None:
        first = self.streams[0]
        for name, stream in zip(self.names[1:], self.streams[1:], strict=True):
            for what in _SAME:
                a, b = getattr(first, what), getattr(stream, what)
                if a != b:
                    raise ConfigError(f"mix: {what} of {self.names[0]} is {a}, of {name} {b}")
            if isinstance(stream, SequenceStream) or isinstance(first, SequenceStream):
                raise ConfigError("mix: expected streams of rows, got a SequenceStream")
            if stream.hooks != first.hooks:
                raise ConfigError(
                    f"mix: {self.names[0]} streams {', '.join(first.hooks)}, {name} "
                    f"{', '.join(stream.hooks)}; a mix needs rows of the same hooks from all"
                )
            for hook in first.hooks:
                a, b = (s.snapshot.hooks[hook].d for s in (first, stream))
                if a != b:
                    raise ConfigError(
                        f"mix: hook {hook} has {a} channels in {self.names[0]} and {b} in {name}; "
                        "their models differ in width, train them apart"
                    )

    def counts(self, step: int) -> list[int]:
        """Rows of each store in the first `step` global batches of an epoch."""
        return self._counts(min(step * self.batch_tokens, self.n_rows))

    # -- what the mix knows ------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """Of all streams together; they wait in turn, so seconds are those of the slowest."""
        each = [s.traffic for s in self.streams]
        return Traffic(
            sum(t.bytes for t in each),
            sum(t.rows for t in each),
            sum(t.waited for t in each),
            max(t.seconds for t in each),
        )

    def space(self, hook: str) -> HookSpace:
        """Width and statistics of the weighted mixture: exact, means and variances combined."""
        spaces = [s.space(hook) for s in self.streams]
        w = [float(x) for x in self.weights]
        means = [s.mean.to(torch.float64) for s in spaces]
        mean = torch.stack([x * m for x, m in zip(w, means, strict=True)]).sum(0)
        spread = [float((m - mean).square().sum()) for m in means]
        return HookSpace(
            name=hook,
            d=spaces[0].d,
            mean=mean.to(torch.float32),
            mean_norm=sum(x * s.mean_norm for x, s in zip(w, spaces, strict=True)),
            variance=sum(x * (s.variance + b) for x, s, b in zip(w, spaces, spread, strict=True)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Epoch, step, weights, and what each stream is; enough for exactly the next batch."""
        place = ("epoch", "step_in_epoch")
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "weights": [str(w) for w in self.weights],
            "streams": [
                {k: v for k, v in s.state_dict().items() if k not in place} for s in self.streams
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. ConfigError if this mix would give other batches."""
        mine, then = self.state_dict(), state.get("streams") or []
        wrong = changes(state, {"weights": mine["weights"]})
        if len(then) != len(self.streams):
            wrong.append(f"stores: {len(then)} then, {len(self.streams)} now")
        for name, a, b in zip(self.names, then, mine["streams"], strict=False):
            wrong += changes(a, b, of=f" of {name}")
        if wrong:
            raise ConfigError(f"cannot resume the mix, it changed: {'; '.join(wrong)}")
        self.epoch, self.step_in_epoch = int(state["epoch"]), int(state["step_in_epoch"])

    # -- batches -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Mixed batches from the current state on, epoch after epoch, without end."""
        steps = self.batches_per_epoch
        if not all(self.counts(steps)):
            raise ConfigError(self._too_few())
        running = {
            i: s.slices(self.epoch, self.step_in_epoch, steps, self.bound(i))
            for i, s in enumerate(self.streams)
        }
        while True:
            number = self.epoch * steps + self.step_in_epoch
            mixed = self._next(running, self.step_in_epoch, self.epoch, number)
            self.epoch, self.step_in_epoch = divmod(number + 1, steps)
            yield mixed

    def one_pass(self) -> Iterator[Batch]:
        """Every row of every store once, by weight while all last; the last batch may be short."""
        steps = -(-self.n_rows // self.batch_tokens)
        running = {
            i: s.in_order(steps, self.bound(i)) for i, s in enumerate(self.streams) if s.n_rows
        }
        for step in range(steps):
            yield self._next(running, step, 0, step)

    def bound(self, i: int) -> Callable[[int], int]:
        """Rows of stream `i` in the first n batches of an epoch, as a function of n."""
        return lambda step: self.counts(step)[i]

    def _next(
        self, running: Mapping[int, Iterator[Batch]], step: int, epoch: int, number: int
    ) -> Batch:
        """The next batch of each stream that has rows in batch `step`, as one."""
        before, after = self.counts(step), self.counts(step + 1)
        parts = [(i, next(b)) for i, b in running.items() if after[i] > before[i]]
        wrong = [b.step for _, b in parts if b.step != number]
        if wrong:
            raise AssertionError(f"streams of a mix out of step: {wrong}, expected {number}")
        segments = [self._first_segment[i] + b.segment for i, b in parts]
        batches = [b for _, b in parts]
        acts = {h: torch.cat([b.acts[h] for b in batches]) for h in self.hooks}
        return Batch(acts, lambda: _tables(batches), np.concatenate(segments), epoch, number)

    def _too_few(self) -> str:
        have = (
            f"{name} {s.n_rows:,} rows (weight {float(w):.3g})"
            for name, s, w in zip(self.names, self.streams, self.weights, strict=True)
        )
        split = self.streams[0].filter.split
        return (
            f"mix: the {split} split has no epoch of batches of {self.batch_tokens:,} rows that "
            f"holds rows of each store. There are {'; '.join(have)}. Lower batch_tokens, cache "
            "more tokens, or change the weights"
        )


def _tables(batches: Sequence[Batch]) -> TokenTable:
    columns = zip(*(vars(b.tokens).values() for b in batches), strict=True)
    return TokenTable(*(np.concatenate(c) for c in columns))


def _shares(weights: Sequence[float], names: Sequence[str]) -> list[Fraction]:
    """Weights that add up to 1, exactly. ConfigError for one that is not positive and finite."""
    for name, w in zip(names, weights, strict=True):
        if not (math.isfinite(w) and w > 0):
            raise ConfigError(f"mix: the weight of {name} must be more than 0, got {w}")
    exact = [Fraction(w) for w in weights]
    return [w / sum(exact) for w in exact]
