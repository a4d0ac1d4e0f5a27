"""The loss terms, as plain functions: reconstruction, L1, and AuxK for dead latents.

Every term is a mean over tokens, so its size does not depend on the batch. FVU divides by the
variance of the whole store instead of the batch's: no bias at small batches, and coefficients of
other terms carry over between layers and models. AuxK divides by the residual's variance in the
batch, as its authors do; that one is biased low by a factor (B-1)/B, nothing at B = 4096.

Shapes: B tokens, E output width, F latents, A auxiliary slots (k_aux).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saetrain.codes import Codes, SparseCodes, decode_codes, prefer_dense
from saetrain.sums import total

Reconstruction = Literal["fvu", "mse", "sse"]


def reconstruction(e_BE: Tensor, kind: Reconstruction, variance: Tensor | float, d: int) -> Tensor:
    """Size of the residual e = x' - x̂', a scalar.

    fvu: mean_n ||e_n||² / `variance`, the store's E||x' - mean||² (1 for the mean predictor).
    mse: mean over tokens and the `d` channels. sse: summed over channels, mean over tokens.
    """
    sse = e_BE.square().sum(-1).mean()
    if kind == "fvu":
        return sse / variance
    return sse / d if kind == "mse" else sse


def l1(codes: Codes, decoder_norms_F: Tensor | None = None) -> Tensor:
    """mean_n Σ_i f_i, or mean_n Σ_i f_i ||w_i|| with the decoder's row norms.

    The weighted form makes a free decoder safe: growing w_i while shrinking f_i gains nothing
    (Anthropic, Circuits Updates, April 2024). Latents are non-negative, so Σ f is the L1 norm.
    """
    if isinstance(codes, SparseCodes):
        f = codes.values.to(torch.promote_types(codes.values.dtype, torch.float32))
        weighted = f if decoder_norms_F is None else f * decoder_norms_F[codes.indices]
        return weighted.sum(-1).mean()
    # Sum over tokens first: no second tensor of size batch x latents, and float32 under autocast.
    accumulate = torch.promote_types(codes.dtype, torch.float32)
    mean_F = codes.flatten(0, -2).sum(0, dtype=accumulate) / codes.shape[:-1].numel()
    return mean_F.sum() if decoder_norms_F is None else (mean_F * decoder_norms_F).sum()


def auxk(e_BE: Tensor, aux: SparseCodes, W_dec_FE: Tensor, dead_F: Tensor) -> Tensor:
    """AuxK: how well the best dead latents explain what the living ones left over (a scalar).

    Σ||e - ê||² / Σ||e - mean_batch e||² with e detached and ê = aux @ W_dec, without b_dec
    (Gao et al. 2024, arXiv 2406.04093, app. A.2). `aux` holds dead latents only, see
    `saetrain.codes.select_topk`. Exactly 0, with zero gradients, when no latent is dead or the
    residual does not vary; a non-finite residual stays non-finite.
    """
    many = prefer_dense(aux.values.shape[-1], aux.n_latents)
    return explained_by(decode_codes(aux.dense() if many else aux, W_dec_FE), e_BE, dead_F)


def explained_by(guess_BE: Tensor, e_BE: Tensor, dead_F: Tensor) -> Tensor:
    """AuxK of a guess ê that an architecture has decoded by itself."""
    target_BE = e_BE.detach()
    variation = total((target_BE - target_BE.mean(0)).square())
    off = (variation == 0) | ~dead_F.any()  # on the device: no wait for the GPU
    ratio = total((target_BE - guess_BE).square()) / variation.masked_fill(off, 1.0)
    return ratio.masked_fill(off, 0.0)
