"""What a stream yields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import TokenTable


@dataclass(frozen=True)
class Batch:
    """Row-aligned activations of one or several hooks, and where the rows come from.

    `acts` may lie in memory that the stream uses again once all references to the batch are gone.
    """

    acts: dict[str, Tensor]  # hook -> (B, d)
    table: TokenTable | Callable[[], TokenTable] = field(repr=False)
    segment: NDArray[np.int32]  # (B,) index into the segments
    epoch: int
    step: int  # counts over epochs

    @cached_property
    def tokens(self) -> TokenTable:
        """Token table of the same rows; read when it is asked for."""
        return self.table() if callable(self.table) else self.table

    def __len__(self) -> int:
        return len(self.segment)

    @property
    def n_tokens(self) -> int:
        """Rows, counted as in `batch_tokens`."""
        return len(self.segment)

    @property
    def n_counted(self) -> int:
        """Rows that count."""
        return len(self.segment)

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What an SAE is given: the activations, and masks where it reads whole contexts."""
        return self.acts

    def counted(self) -> tuple[dict[str, Tensor], NDArray[np.int32], NDArray[Any]]:
        """(activations (N, d) by hook, segment (N,), ctx (N,)) of the rows that count: all here."""
        return self.acts, self.segment, self.tokens.ctx
