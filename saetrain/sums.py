"""Sums that do not depend on the number of threads.

torch splits one large sum among its threads, so its last digits change with their number; a sum
along the last dimension stays within one thread for each result. Sums of such sums are the same on
any machine with the same instructions, at the cost of one more small pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROW = 4096  # numbers that one thread adds up


def total(x: Tensor) -> Tensor:
    """() sum of all elements, in their type."""
    x = x.reshape(-1)
    while len(x) > _ROW:
        x = F.pad(x, (0, -len(x) % _ROW)).view(-1, _ROW).sum(-1)
    return x.sum()


def length(x: Tensor) -> Tensor:
    """() Euclidean norm of all elements, in their type."""
    if x.dim() > 1:  # along the dimension that lies together in memory
        x = torch.linalg.vector_norm(x, dim=min(range(x.dim()), key=x.stride))
    return torch.sqrt(total(x.square()))
