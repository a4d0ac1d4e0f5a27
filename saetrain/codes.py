"""Latent activations: dense tensors, or (values, indices) where at most K of F latents fire.

TopK-like codes stay sparse through decode and backward; nothing dense of size batch x latents is
made after the selection unless a caller asks for it with `dense`.

Shapes: ... any leading dimensions (usually B tokens), F latents, K active slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """At most K non-zero latents per token. A slot with value 0 is an unused slot."""

    values: Tensor  # (..., K), non-negative
    indices: Tensor  # (..., K), int64 in [0, n_latents), distinct within a token
    n_latents: int

    def dense(self) -> Tensor:
        """(..., F) with zeros elsewhere. Costs batch x latents memory."""
        out = self.values.new_zeros(*self.values.shape[:-1], self.n_latents)
        return out.scatter_(-1, self.indices, self.values)


Codes = Tensor | SparseCodes


def dense(codes: Codes) -> Tensor:
    """(..., F) whatever the form."""
    return codes.dense() if isinstance(codes, SparseCodes) else codes


def decode_codes(codes: Codes, W_dec_FE: Tensor) -> Tensor:
    """codes @ W_dec: (..., E). Sparse codes gather only the rows that fire."""
    if not isinstance(codes, SparseCodes):
        return codes @ W_dec_FE
    lead, k = codes.values.shape[:-1], codes.values.shape[-1]
    out = nnf.embedding_bag(
        codes.indices.reshape(-1, k),
        W_dec_FE,
        per_sample_weights=codes.values.reshape(-1, k).to(W_dec_FE.dtype),
        mode="sum",
    )
    return out.reshape(*lead, W_dec_FE.shape[-1])


def l0(codes: Codes) -> Tensor:
    """Number of latents above zero per token, (...,) int64."""
    values = codes.values if isinstance(codes, SparseCodes) else codes
    return (values > 0).sum(-1)


def firing_counts(codes: Codes) -> Tensor:
    """How many tokens each latent fired on, (F,) int64."""
    if not isinstance(codes, SparseCodes):
        return (codes > 0).reshape(-1, codes.shape[-1]).sum(0)
    fired = (codes.values > 0).reshape(-1)
    counts = torch.zeros(codes.n_latents, dtype=torch.int64, device=codes.values.device)
    return counts.scatter_add_(0, codes.indices.reshape(-1), fired.to(torch.int64))
