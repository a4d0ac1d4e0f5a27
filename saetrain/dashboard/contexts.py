"""Latents of chosen rows of a segment, for SAEs that read whole contexts (`unit = "sequence"`).

The contexts that the rows are in are read once, put together by position and encoded some at a
time, as `saetrain.stream.SequenceStream` has them: padding, and for the train split held-out rows,
are not there. Cost: the activations of all these contexts of one segment in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import TokenTable
from saetrain.codes import Codes
from saetrain.units import DOCUMENT, MASK, PRESENT, encode_counted

Rows = NDArray[np.int64]
_ROWS = 4096  # encoded at once, about
_X = "x"


@dataclass(frozen=True)
class Contexts:
    """Encodes rows together with the contexts they are in."""

    sae: Any
    there: Callable[[TokenTable], NDArray[np.bool_]]  # which rows may be attended to
    apart: bool  # the host kept packed documents apart
    device: str | torch.device

    def encoded(
        self, read: Callable[[Rows], Iterator[tuple[Rows, Tensor]]], tokens: TokenTable, rows: Rows
    ) -> Iterator[tuple[Rows, Codes]]:
        """(row numbers, codes (N, F)) of all `rows`; `read` gives activations of ascending ones."""
        wanted = np.zeros(len(tokens.ctx), dtype=np.bool_)
        wanted[rows] = True
        ctx = np.unique(tokens.ctx[rows])
        members = np.flatnonzero(np.isin(tokens.ctx, ctx) & (self.there(tokens) | wanted))
        x_ND = torch.cat([x for _, x in read(members)])
        slot = np.searchsorted(ctx, tokens.ctx[members])
        length = int(tokens.pos[members].max()) + 1
        at_once = max(1, _ROWS // length)
        for first in range(0, len(ctx), at_once):
            some = np.flatnonzero((slot >= first) & (slot < first + at_once))
            number = np.full((min(at_once, len(ctx) - first), length), -1, dtype=np.int64)
            number[slot[some] - first, tokens.pos[members[some]]] = members[some]
            inputs = self._inputs(number, members, x_ND, tokens, wanted)
            yield number[inputs[MASK].cpu().numpy()], encode_counted(self.sae, inputs, _X)

    def _inputs(
        self,
        number: Rows,
        members: Rows,
        x_ND: Tensor,
        tokens: TokenTable,
        wanted: NDArray[np.bool_],
    ) -> dict[str, Tensor]:
        """Contexts whose rows are `number` (S, T), -1 for none, with their masks."""
        present = number >= 0
        x = x_ND.new_zeros(*number.shape, x_ND.shape[-1])
        x[torch.from_numpy(present)] = x_ND[np.searchsorted(members, number[present])]
        columns = {PRESENT: present, MASK: present & wanted[number]}
        if self.apart:
            columns[DOCUMENT] = np.where(present, tokens.doc[number].view(np.int64), 0)
        found = {name: torch.from_numpy(column) for name, column in columns.items()}
        return {name: t.to(self.device) for name, t in ({_X: x} | found).items()}
