"""Initial weights, and the unit-norm decoder constraint.

A dictionary whose encoder starts as the transpose of its decoder reconstructs something from step
0 and leaves fewer latents dead (Gao et al. 2024, arXiv 2406.04093, app. A). The decoder bias starts
at the mean of the data, known exactly from the store's statistics, or at the geometric median of
the first batch, which outliers move less (Bricken et al. 2023). The encoder's length decides the
error of step 0: random rows overlap and explain the same part of x many times over, so at length 1
the first reconstructions overshoot (k = 32 of 2,048 latents in 128 channels: FVE -0.75, at 0.40
0.62), and hundreds of steps go into undoing that. `best_norm` takes the length with the least
error; Gao et al. (app. A.1) match the lengths of x̂ and x (0.51 there, FVE 0.58).

Unit-norm rows stop the decoder from growing while the latents shrink; the gradient's part along a
row would only be undone by the renormalisation, so it is removed before the optimizer (and its
momentum) sees it.

Shapes: D input width, E output width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from saetrain.kernels.rows import project_rows_, renormalise_rows_
from saetrain.sums import total


def random_rows(n_latents: int, width: int, norm: float = 1.0) -> Tensor:
    """(F, E): uniformly random directions, every row of length `norm`."""
    rows_FE = torch.randn(n_latents, width)
    lengths_F1: Tensor = torch.linalg.vector_norm(rows_FE, dim=1, keepdim=True)
    return rows_FE * (norm / lengths_F1)


def transposed(W_dec_FE: Tensor) -> Tensor:
    """(E, F) copy: the tied start of an encoder, with memory of its own.

    Its strides are (1, E): one latent after the other, as gradients summed by latent come and as
    the fastest product wants it (see `saetrain.kernels.gemm`).
    """
    return W_dec_FE.detach().clone(memory_format=torch.contiguous_format).T


# Lengths that a search tries: 0.05 to 5, each 10 % above the one before.
NORMS = tuple(0.05 * 1.1**i for i in range(49))


@torch.no_grad()
def best_norm(y: Tensor, predict: Callable[[float], Tensor], power: int) -> float:
    """The length n between the ends of NORMS with the least Σ||y - predict(n)||².

    For predictions that are a + n^power·g, as of all activations without thresholds: two of them
    give a and g, and n^power = <y - a, g> / <g, g>. Shapes: y and predictions alike.
    """
    half, one = predict(0.5), predict(1.0)
    g = (one - half) / (1 - 0.5**power)
    size = float(total(g.square()))
    share = float(total(g * (y - (one - g)))) / size if size else 0.0
    length = math.pow(max(0.0, share), 1 / power)
    return min(NORMS[-1], max(NORMS[0], length))


@torch.no_grad()
def geometric_median(x_BD: Tensor, steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """(D,): the point with the least sum of distances to the rows (Weiszfeld's iteration).

    Starts at the mean and stops once a step is below `tolerance` of the mean distance. Rows that
    coincide with the point count as if they were that close, so they do not divide by 0.
    """
    point_D = x_BD.mean(0)
    scale = float((x_BD - point_D).norm(dim=1).mean())
    for _ in range(steps if scale > 0 else 0):
        weights_B = 1 / (x_BD - point_D).norm(dim=1).clamp(min=tolerance * scale)
        next_D = (weights_B @ x_BD) / weights_B.sum()
        moved = float((next_D - point_D).norm())
        point_D = next_D
        if moved <= tolerance * scale:
            break
    return point_D


@torch.no_grad()
def remove_parallel_grad(W_FE: nn.Parameter) -> None:
    """Take from each row's gradient its part along the row. No gradient: nothing to do."""
    if W_FE.grad is None:
        return
    project_rows_(W_FE.grad, W_FE)


@torch.no_grad()
def renormalise_rows(W_FE: nn.Parameter) -> None:
    """Scale every row back to length 1."""
    renormalise_rows_(W_FE)
