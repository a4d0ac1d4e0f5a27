"""PCA of equal rank, the baseline every SAE is printed beside.

The best linear reconstruction from r directions: mean and covariance of training rows in float64,
its r leading eigenvectors, FVE on held-out rows. An SAE with L0 = r chooses r directions anew for
each token, so it should do better; if not, its number says so. Cost: rows * D^2 once, D^3 for the
eigenvectors. Bias: fitted on a capped number of rows, so for D near that number it is too low.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.evals.reconstruction import rows
from saetrain.metrics import Reconstruction
from saetrain.stream import Batch


@dataclass(frozen=True)
class PCA:
    """Affine subspace of rank r."""

    mean_D: Tensor  # float64
    basis_DR: Tensor  # float64, orthonormal columns, leading first
    n: int  # rows it was fitted on

    def of_rank(self, rank: int) -> PCA:
        """The subspace of the leading `rank` directions, of all there are at most."""
        return replace(self, basis_DR=self.basis_DR[:, : max(0, rank)].contiguous())

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """Projection of x onto the subspace, (B, D) float64."""
        off_BD = x_BD.to(torch.float64) - self.mean_D
        return self.mean_D + (off_BD @ self.basis_DR) @ self.basis_DR.T


@torch.no_grad()
def fit(batches: Iterable[Batch], hook: str, rank: int, max_rows: int, reference: Tensor) -> PCA:
    """PCA of at most `max_rows` rows. `reference` (D,) near their mean avoids cancellation."""
    n, m0_D = 0, reference.to(torch.float64)
    sum_D, gram_DD = torch.zeros_like(m0_D), m0_D.new_zeros(len(m0_D), len(m0_D))
    for acts, segment_B, _ in rows(batches, max_rows):
        off_BD = acts[hook].to(torch.float64) - m0_D
        n += len(segment_B)
        sum_D += off_BD.sum(0)
        gram_DD.addmm_(off_BD.T, off_BD)
    if n < 2:
        raise ConfigError(f"eval.pca_tokens: PCA needs at least 2 training rows, got {n}")
    shift_D = sum_D / n
    cov_DD = gram_DD / n - torch.outer(shift_D, shift_D)
    _, vectors_DD = torch.linalg.eigh(cov_DD)  # ascending
    rank = max(0, min(rank, len(m0_D)))
    return PCA(m0_D + shift_D, vectors_DD.flip(1)[:, :rank].contiguous(), n)


@torch.no_grad()
def evaluate(
    pca: PCA, batches: Iterable[Batch], hook: str, tokens: int | None = None
) -> dict[str, Any]:
    """FVE and MSE of the projection on at most `tokens` rows."""
    recon = Reconstruction(pca.mean_D)
    for acts, _, _ in rows(batches, tokens):
        recon.update(acts[hook], pca.reconstruct(acts[hook]))
    scores = recon.compute()
    return {
        "rank": pca.basis_DR.shape[1],
        "fve": scores["fve"],
        "mse": scores["mse"],
        "tokens": recon.n,
        "fitted_on": pca.n,
    }
