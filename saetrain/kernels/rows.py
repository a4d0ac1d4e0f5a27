"""Unit-norm decoder rows and their projected gradients, one pass over memory each.

Written with whole-tensor operations, projection and renormalisation make a dozen passes over W and
its gradient and several temporaries of their size, all of which are fresh memory. In pieces of 1 MB
the temporaries stay in cache and W is read once and written once. On other devices there is one
piece. Plain twins: g - (g·w / w·w) w, and w / ||w||.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 18  # elements: 1 MB


def project_rows_(g_FE: Tensor, W_FE: Tensor) -> None:
    """Take from each row of g its part along the row of W, in place."""
    for g, w in _pieces(g_FE, W_FE):
        along = torch.linalg.vecdot(g, w) / torch.linalg.vecdot(w, w)
        g.addcmul_(w, along[..., None], value=-1)


def renormalise_rows_(W_FE: Tensor) -> None:
    """Scale each row of W to length 1, in place."""
    for (w,) in _pieces(W_FE):
        w.div_(torch.linalg.vector_norm(w, dim=-1, keepdim=True))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each (F, E), all rows at once where pieces do not pay."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= PIECE:
        yield tensors
        return
    step = max(1, PIECE // first[0].numel())
    yield from zip(*(torch.split(t, step) for t in tensors), strict=True)
