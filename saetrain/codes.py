"""Latent activations: dense tensors, or (values, indices) where at most K of F latents fire.

TopK-like codes stay sparse through decode and backward; nothing dense of size batch x latents is
made after the selection unless a caller asks for it with `dense`. A training step costs
2BDF + 8BKD operations instead of 12BDF: only the encoder's forward is a full matrix product.
`select_topk` is the fast path of `topk_codes`, which autograd differentiates densely.

Shapes: ... any leading dimensions (usually B tokens), D input width, E output width, F latents,
K active slots, A auxiliary slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def topk_codes(h: Tensor, k: int) -> SparseCodes:
    """relu(topk(h)): the k largest pre-activations h (..., F), those below zero cut to 0."""
    values, indices = h.topk(k, dim=-1, sorted=False)
    return SparseCodes(values.relu(), indices, h.shape[-1])


def groupmax_codes(h: Tensor, k: int) -> SparseCodes:
    """relu of the largest pre-activation in each of k runs of F/k latents, h (..., F)."""
    size = h.shape[-1] // k
    values, inside = h.reshape(*h.shape[:-1], k, size).max(-1)
    return SparseCodes(values.relu(), inside + size * torch.arange(k, device=h.device), h.shape[-1])


def jumprelu_codes(h: Tensor, threshold_F: Tensor) -> Tensor:
    """relu(h) where h is above its threshold, dense (..., F)."""
    return h.relu() * (h > threshold_F)


def select_topk(
    x_BD: Tensor,
    W_enc_DF: Tensor,
    b_enc_F: Tensor,
    k: int,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
) -> tuple[SparseCodes, SparseCodes | None]:
    """`topk_codes(x @ W_enc + b_enc, k)` with a sparse backward, and the AuxK candidates.

    With `dead_F` (bool) also the `k_aux` largest positive pre-activations among dead latents (slots
    left over have value 0 and no gradient). Gradients reach W_enc and b_enc through both; x_BD is
    data and gets none. Raises ValueError if x_BD asks for a gradient: use `topk_codes` there.
    """
    if x_BD.requires_grad:
        raise ValueError("select_topk gives no gradient to its input: use topk_codes")
    if dead_F is None:
        k_aux = 0
    out = _SelectTopK.apply(  # type: ignore[no-untyped-call]
        x_BD, W_enc_DF, b_enc_F, k, dead_F, k_aux
    )
    n_latents = W_enc_DF.shape[1]
    codes = SparseCodes(out[0], out[1], n_latents)
    return codes, SparseCodes(out[2], out[3], n_latents) if k_aux else None


def input_bias(b_enc_F: Tensor, b_dec_D: Tensor, W_enc_DF: Tensor) -> Tensor:
    """b_enc, carrying the gradient that b_dec gets through the encoder's input x - b_dec.

    Use with x - b_dec.detach(). The added term is exactly 0; its gradient -W_enc Σ_n ∂h_n costs
    2DF instead of the 2BDF of differentiating the input per token.
    """
    return b_enc_F + (b_dec_D.detach() - b_dec_D) @ W_enc_DF.detach()


def prefer_dense(k: int, n_latents: int) -> bool:
    """Whether a matrix product beats gathering rows: from about one latent in 16 on (measured)."""
    return 16 * k >= n_latents


class _SelectTopK(torch.autograd.Function):
    """Encode, select, and send gradients back through the selected slots only."""

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_DF: Tensor, b_F: Tensor, k: int, dead_F: Tensor | None, k_aux: int
    ) -> tuple[Tensor, ...]:
        h_BF = x_BD @ W_DF
        h_BF += b_F.to(h_BF.dtype)
        values, indices = h_BF.topk(k, dim=-1, sorted=False)
        if k_aux:
            # Living latents tie with silent dead ones at 0, which relu makes an empty slot.
            h_BF.masked_fill_(~dead_F, 0)  # type: ignore[operator]
            aux_values, aux_indices = h_BF.topk(k_aux, dim=-1, sorted=False)
        else:
            aux_values, aux_indices = values[..., :0], indices[..., :0]
        out = values.relu(), indices, aux_values.relu(), aux_indices.contiguous()
        ctx.save_for_backward(x_BD, *out)
        ctx.n_latents, ctx.dtypes = W_DF.shape[1], (W_DF.dtype, b_F.dtype)
        ctx.mark_non_differentiable(out[1], out[3])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, values, indices, aux_values, aux_indices = ctx.saved_tensors
        codes = SparseCodes(values, indices, ctx.n_latents)
        grad_W, grad_b = _encoder_grads(x_BD, codes, grads[0])
        if k_aux := aux_values.shape[-1]:
            aux = SparseCodes(aux_values, aux_indices, ctx.n_latents)
            aux_W, aux_b = _encoder_grads(x_BD, aux, grads[2], prefer_dense(k_aux, ctx.n_latents))
            grad_W, grad_b = grad_W + aux_W, grad_b + aux_b
        W_dtype, b_dtype = ctx.dtypes
        return None, grad_W.T.to(W_dtype), grad_b.to(b_dtype), None, None, None


def _encoder_grads(
    x_BD: Tensor, codes: SparseCodes, grad_BK: Tensor, dense_pays: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of (W_enc^T (F, D), b_enc (F,)); slots at 0 pass nothing, as relu has it."""
    grad_BK = grad_BK * (codes.values > 0)
    picked = SparseCodes(grad_BK.to(x_BD.dtype), codes.indices, codes.n_latents)
    grad_b_F = x_BD.new_zeros(codes.n_latents)
    grad_b_F.scatter_add_(0, codes.indices.reshape(-1), picked.values.reshape(-1))
    if dense_pays:
        return picked.dense().T @ x_BD, grad_b_F
    return _sum_by_latent(x_BD, picked), grad_b_F


def _sum_by_latent(x_BD: Tensor, weights: SparseCodes) -> Tensor:
    """(F, D): row i sums weight · x over the slots that chose latent i.

    Sorting the slots by latent turns the sum into bags of token rows, so the (B K, D) products
    are never stored and the order of summation is fixed.
    """
    by_latent, order = weights.indices.reshape(-1).sort(stable=True)
    starts_F = torch.searchsorted(by_latent, torch.arange(weights.n_latents, device=x_BD.device))
    tokens = order // weights.indices.shape[-1]
    return nnf.embedding_bag(
        tokens,
        x_BD,
        starts_F,
        per_sample_weights=weights.values.reshape(-1)[order],
        mode="sum",
    )
