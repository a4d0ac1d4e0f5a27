"""Initial weights, and the unit-norm decoder constraint.

A dictionary whose encoder starts as the transpose of its decoder reconstructs something from step
0 and leaves fewer latents dead (Gao et al. 2024, arXiv 2406.04093, app. A). The decoder bias starts
at the mean of the data, known exactly from the store's statistics. Unit-norm rows stop the decoder
from growing while the latents shrink; the gradient's part along a row would only be undone by the
renormalisation, so it is removed before the optimizer (and its momentum) sees it.

Shapes: D input width, E output width, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_rows(n_latents: int, width: int, norm: float = 1.0) -> Tensor:
    """(F, E): uniformly random directions, every row of length `norm`."""
    rows_FE = torch.randn(n_latents, width)
    lengths_F1: Tensor = torch.linalg.vector_norm(rows_FE, dim=1, keepdim=True)
    return rows_FE * (norm / lengths_F1)


def transposed(W_dec_FE: Tensor) -> Tensor:
    """(E, F) contiguous copy: the tied start of an encoder, with memory of its own."""
    W_EF: Tensor = W_dec_FE.detach().T
    return W_EF.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def remove_parallel_grad(W_FE: nn.Parameter) -> None:
    """Take from each row's gradient its part along the row. No gradient: nothing to do."""
    if W_FE.grad is None:
        return
    along_F1 = (W_FE.grad * W_FE).sum(1, keepdim=True)
    W_FE.grad.sub_(W_FE * (along_F1 / (W_FE * W_FE).sum(1, keepdim=True)))


@torch.no_grad()
def renormalise_rows(W_FE: nn.Parameter) -> None:
    """Scale every row back to length 1."""
    W_FE.div_(W_FE.norm(dim=1, keepdim=True))
