"""torch's fused Adam and AdamW for weights that are not stored row by row.

The fused step reads memory from front to back; what has other strides, such as an encoder stored
one latent after the other, it copies to that order and back, parameter, gradient and both moments:
twice the time of the step. Adam is elementwise, so it is given views in the order of memory
instead. Plain twin: torch.optim.Adam(fused=True), equal up to the rounding of the last few elements
of a tensor, which the vectorised loop does not reach.

Projection, clipping and renormalisation of the decoder are passes of their own (rows.py, optim.py).
All of them in one pass with Adam, in pieces that stay in cache, took 0.85 to 0.89 of their time,
which is 6 % of a step: below 1 % of it, for an optimizer that would be Adam only (docs/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _InMemoryOrder(torch.optim.Adam):
    def _init_group(self, group: Any, params: list[Tensor], *lists: list[Tensor]) -> bool:
        found: bool = super()._init_group(group, params, *lists)  # type: ignore[no-untyped-call]
        for i, p in enumerate(params):
            if p.is_contiguous():
                continue
            order = sorted(range(p.dim()), key=p.stride, reverse=True)
            for each in (params, *lists):  # the last list holds step counts
                if i < len(each) and each[i].shape == p.shape and each is not lists[-1]:
                    each[i] = each[i].detach().permute(order)
        return found


class Adam(_InMemoryOrder):
    """torch.optim.Adam."""


class AdamW(torch.optim.AdamW, _InMemoryOrder):
    """torch.optim.AdamW."""
