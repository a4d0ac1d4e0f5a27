"""A stream from memory with the interface of `saetrain.stream.Stream`, and a planted dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from actcache.store import TokenTable
from saetrain.saes.base import HookSpace
from saetrain.stream import Batch


def planted(n: int, d: int, seed: int = 0, n_atoms: int = 24, mean: float = 2.0) -> np.ndarray:
    """n rows of a few random positive atoms each, about a non-zero mean, and a little noise."""
    atoms = np.random.default_rng(1234).normal(size=(n_atoms, d))
    rng = np.random.default_rng(seed)
    codes = (rng.random((n, n_atoms)) < 0.1) * rng.exponential(1.0, (n, n_atoms))
    return codes @ atoms + mean + 0.05 * rng.normal(size=(n, d))


def token_rows(n: int, context: int = 8) -> TokenTable:
    row = np.arange(n)
    return TokenTable(
        token_id=row.astype(np.uint32),
        doc=(row // context).astype(np.uint64),
        ctx=(row // context).astype(np.uint32),
        pos=(row % context).astype(np.uint32),
        flags=np.zeros(n, dtype=np.uint8),
    )


class FakeStream:
    """Batches of the rows of one array; a new order each epoch, given by (seed, epoch)."""

    def __init__(self, x: np.ndarray, batch_tokens: int, hook: str = "resid.2") -> None:
        self.x, self.batch_tokens, self.hook = x, batch_tokens, hook
        self.n_rows = len(x)
        self.batches_per_epoch = len(x) // batch_tokens
        self.step = 0

    def space(self, hook: str) -> HookSpace:
        mean = self.x.mean(0)
        return HookSpace(
            name=hook,
            d=self.x.shape[1],
            mean=torch.from_numpy(mean).float(),
            mean_norm=float(np.linalg.norm(self.x, axis=1).mean()),
            variance=float(np.square(self.x - mean).sum(1).mean()),
        )

    def _batch(self, rows: np.ndarray, epoch: int, step: int) -> Batch:
        acts = {self.hook: torch.from_numpy(self.x[rows]).float()}
        tokens = token_rows(self.n_rows).take(rows)
        return Batch(acts, tokens, np.zeros(len(rows), dtype=np.int32), epoch, step)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, i = divmod(self.step, self.batches_per_epoch)
            order = np.random.default_rng([7, epoch]).permutation(self.n_rows)
            rows = order[i * self.batch_tokens : (i + 1) * self.batch_tokens]
            self.step += 1
            yield self._batch(rows, epoch, self.step - 1)

    def one_pass(self) -> Iterator[Batch]:
        for i, first in enumerate(range(0, self.n_rows, self.batch_tokens)):
            rows = np.arange(first, min(first + self.batch_tokens, self.n_rows))
            yield self._batch(rows, 0, i)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
