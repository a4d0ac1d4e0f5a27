"""What a stream yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

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
