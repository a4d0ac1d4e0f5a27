"""Metrics as sums that merge: float64 sums while reading, one division at the end.

`update` takes a batch, `merge` adds what another rank or shard saw, `compute` divides; how rows
were split into batches changes nothing beyond float64 rounding. Nothing here touches an SAE.
Distances are taken from a fixed reference m0 (the store's mean), because activations have a large
mean and sums about zero would cancel. Formulas: `FORMULAS`; the variance is about the mean of the
evaluated rows, not about zero, which inflates the score when the mean is large.

Shapes: B tokens in a batch, D width, F latents, C contexts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.codes import Codes, SparseCodes, firing_counts, l0
from saetrain.errors import TrainingError

FORMULAS = {
    "fve": "1 - S|x-y|^2 / (S|x-m0|^2 - n|xbar-m0|^2)",
    "mse": "S|x-y|^2 / (n D)",
    "nmse": "S|x-y|^2 / S|x|^2",
    "cos": "mean of x.y / (|x| |y|)",
    "norm_ratio": "S|y| / S|x|",
    "l0": "mean number of latents above 0 per token; p10, p90: its 10th and 90th percentile",
    "l1": "mean sum of latents per token",
    "dead": "share of latents that fired on none of the n evaluated tokens",
    "fve_se": "standard deviation of fve over bootstrap resamples of contexts",
}

_SCALARS = ("sq_err", "sq_dev", "sq_x", "cos", "norm_x", "norm_y")


class Reconstruction:
    """Sums behind FVE, MSE, cosine and norms of predictions y of rows x."""

    def __init__(self, reference_D: Tensor) -> None:
        self.m0_D = reference_D.to(torch.float64)
        self.n = 0
        self.sums = torch.zeros(len(_SCALARS), dtype=torch.float64, device=reference_D.device)
        self.dev_D = torch.zeros_like(self.m0_D)  # S(x - m0)

    def update(self, x_BD: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch. Returns per-token |x-y|^2 and |x-m0|^2, (B,) float64, for `ContextSums`."""
        x_BD, y_BD = x_BD.to(torch.float64), y_BD.to(torch.float64)
        off_BD = x_BD - self.m0_D
        err_B, dev_B = (x_BD - y_BD).square().sum(-1), off_BD.square().sum(-1)
        sq_B = x_BD.square().sum(-1)  # not the square of a root: whole numbers stay exact
        nx_B, ny_B = sq_B.sqrt(), y_BD.norm(dim=-1)
        # A zero vector has no direction: it counts as orthogonal.
        cos_B = (x_BD * y_BD).sum(-1) / (nx_B * ny_B).clamp_min(torch.finfo(torch.float64).tiny)
        self.n += len(x_BD)
        self.dev_D += off_BD.sum(0)
        parts = (err_B, dev_B, sq_B, cos_B, nx_B, ny_B)
        self.sums += torch.stack([p.sum() for p in parts])
        return err_B, dev_B

    def merge(self, other: Reconstruction) -> None:
        """Add what `other` saw; both must use the same reference."""
        if not torch.equal(self.m0_D, other.m0_D):
            raise ValueError("cannot merge reconstructions about different reference points")
        self.n += other.n
        self.sums += other.sums
        self.dev_D += other.dev_D

    @property
    def mean_offset_sq(self) -> float:
        """|xbar - m0|^2."""
        return float((self.dev_D / self.n).square().sum())

    def compute(self) -> dict[str, float]:
        """fve, mse, nmse, cos, norm_ratio. TrainingError without rows, or on non-finite sums."""
        if self.n == 0:
            raise TrainingError("no rows to evaluate: the held-out split is empty")
        s = dict(zip(_SCALARS, self.sums.tolist(), strict=True))
        if not np.isfinite(list(s.values())).all():
            raise TrainingError(f"the reconstruction is not finite over {self.n} tokens: {s}")
        variance = s["sq_dev"] - self.n * self.mean_offset_sq
        if not variance > 0:
            raise TrainingError(
                f"the {self.n} evaluated rows are all equal, so the fraction of variance explained "
                "is undefined; evaluate more tokens"
            )
        return {
            "fve": 1.0 - s["sq_err"] / variance,
            "mse": s["sq_err"] / (self.n * len(self.m0_D)),
            "nmse": s["sq_err"] / s["sq_x"],
            "cos": s["cos"] / self.n,
            "norm_ratio": s["norm_y"] / s["norm_x"],
        }


class Firing:
    """Which latents fire and how many at once: L0, dead latents, densities."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.counts_F = torch.zeros(n_latents, dtype=torch.int64, device=device)
        # Tokens by their L0.
        self.l0_hist = torch.zeros(n_latents + 1, dtype=torch.int64, device=device)
        self.l1 = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, codes: Codes) -> None:
        """Add the codes of a batch, (B, F) dense or sparse."""
        values = codes.values if isinstance(codes, SparseCodes) else codes
        self.n += len(values)
        self.counts_F += firing_counts(codes)
        self.l0_hist += torch.bincount(l0(codes).flatten(), minlength=len(self.l0_hist))
        self.l1 += values.abs().sum(dtype=torch.float64)

    def merge(self, other: Firing) -> None:
        """Add what `other` saw."""
        self.n += other.n
        self.counts_F += other.counts_F
        self.l0_hist += other.l0_hist
        self.l1 += other.l1

    def compute(self) -> dict[str, Any]:
        """l0 (mean, p10, p90), l1, dead share and its token count, density histogram."""
        if self.n == 0:
            raise TrainingError("no rows to evaluate: the held-out split is empty")
        hist = self.l0_hist.cpu().numpy()
        cumulative = np.cumsum(hist)
        counts = self.counts_F.cpu().numpy()
        return {
            "l0": float(counts.sum()) / self.n,
            "l0_p10": int(np.searchsorted(cumulative, 0.1 * self.n)),
            "l0_p90": int(np.searchsorted(cumulative, 0.9 * self.n)),
            "l1": float(self.l1) / self.n,
            "dead": float((counts == 0).mean()),
            "dead_latents": int((counts == 0).sum()),
            "n_latents": len(counts),
            "density": density_histogram(counts, self.n),
        }


def density_histogram(counts_F: NDArray[np.int64], n: int) -> dict[str, Any]:
    """Latents by log10(fires / n): quarter-decade bins, and latents that never fired on their own.

    {"edges": log10 edges, "counts": per bin, "zero": never fired, "n": tokens}. The bins start at
    the decade of 1/n, the least density that n tokens can show; a latent unseen in n tokens has a
    density below 3/n with 95 % confidence.
    """
    lowest = -int(np.ceil(np.log10(max(n, 10))))
    edges = np.arange(lowest * 4, 1, dtype=np.float64) / 4.0
    fired = counts_F[counts_F > 0]
    counts, _ = np.histogram(np.log10(fired / n), bins=edges)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "zero": int((counts_F == 0).sum()),
        "n": n,
    }


class ContextSums:
    """Per-context sums, for a standard error that respects that tokens of a context go together."""

    def __init__(self) -> None:
        self._keys: list[NDArray[np.uint64]] = []
        self._sums: list[NDArray[np.float64]] = []  # (C, 3): tokens, |x-y|^2, |x-m0|^2
        self._pending = 0

    def update(
        self,
        segment_B: NDArray[np.int32],
        ctx_B: NDArray[np.uint32],
        err_B: NDArray[np.float64],
        dev_B: NDArray[np.float64],
    ) -> None:
        """Add tokens named by (segment, ctx) with what `Reconstruction.update` returned."""
        key_B = segment_B.astype(np.uint64) << np.uint64(32) | ctx_B.astype(np.uint64)
        self._add(key_B, np.stack([np.ones_like(err_B), err_B, dev_B], axis=1))

    def merge(self, other: ContextSums) -> None:
        """Add what `other` saw."""
        for keys, sums in zip(other._keys, other._sums, strict=True):
            self._add(keys, sums)

    def _add(self, keys: NDArray[np.uint64], sums: NDArray[np.float64]) -> None:
        self._keys.append(keys)
        self._sums.append(sums)
        self._pending += len(keys)
        if self._pending > 1 << 20:  # keeps memory at one row per context
            self.table()

    def table(self) -> NDArray[np.float64]:
        """(C, 3) sums per context, ordered by (segment, ctx)."""
        if not self._keys:
            return np.zeros((0, 3))
        keys, where = np.unique(np.concatenate(self._keys), return_inverse=True)
        rows = np.concatenate(self._sums)
        sums = [np.bincount(where, rows[:, j], len(keys)) for j in range(3)]
        table: NDArray[np.float64] = np.stack(sums, axis=1).astype(np.float64)
        self._keys, self._sums, self._pending = [keys], [table], 0
        return table

    def fve_se(self, mean_offset_sq: float, resamples: int, seed: int = 0) -> float | None:
        """Bootstrap standard error of FVE over contexts; None below two contexts or resamples."""
        fves = self.fves(mean_offset_sq, resamples, seed)
        return None if fves is None else float(np.std(fves, ddof=1))

    def fves(
        self, mean_offset_sq: float, resamples: int, seed: int = 0
    ) -> NDArray[np.float64] | None:
        """FVE of each bootstrap resample of contexts; equal seeds draw equal contexts.

        The mean is held at its value over all rows, so each resample is a ratio of two weighted
        sums; the error this makes is of second order in 1/C. Cost: resamples x C.
        """
        table = self.table()
        c = len(table)
        if c < 2 or resamples < 2:
            return None
        weights = np.random.default_rng(seed).multinomial(c, np.full(c, 1 / c), size=resamples)
        n, err, dev = (weights @ table).T
        fves: NDArray[np.float64] = 1.0 - err / (dev - n * mean_offset_sq)
        return fves
