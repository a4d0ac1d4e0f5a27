"""Sparse decode: x̂_b = Σ_k f_bk W_dec[i_bk], and its gradients, each 2BKE operations.

∂f is a dot product per slot, ∂W_dec a sum over the slots of each latent (latents.py). The forward
is `embedding_bag`, on CUDA the kernel of triton_decode.py. Plain twin:
`codes.dense() @ W_dec`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saetrain.kernels import cpu
from saetrain.kernels.latents import dot_rows, sum_by_latent
from saetrain.kernels.triton_decode import decode_forward


def decode(
    values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor, used_BK: Tensor | None = None
) -> Tensor:
    """(B, E), differentiable in values and W. Values are taken in the type of W.

    Slots that are not in `used_BK`, where it is given, must have value 0; they get no gradient.
    """
    values_BK, indices_BK = values_BK.to(W_FE.dtype), indices_BK.contiguous()
    out: Tensor = _Decode.apply(values_BK, indices_BK, W_FE, used_BK)  # type: ignore[no-untyped-call]
    return out


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor, used_BK: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(values_BK, indices_BK, W_FE, used_BK)
        ctx.W = W_FE if W_FE.is_leaf else None
        if cpu.takes(values_BK, W_FE):
            return cpu.decode(values_BK, indices_BK, W_FE)
        if used_BK is not None:
            return _decode_ragged(values_BK, indices_BK, W_FE)
        return decode_forward(values_BK, indices_BK, W_FE)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, W_FE, used_BK = ctx.saved_tensors
        for_values, _, for_W, _ = ctx.needs_input_grad
        grad_BE, grad_values, grad_W = grads[0].to(W_FE.dtype).contiguous(), None, None
        if for_values:
            grad_values = dot_rows(grad_BE, W_FE, indices_BK, used_BK)
        if for_W:
            grad_W = sum_by_latent(grad_BE, values_BK, indices_BK, len(W_FE), ctx.W)
        return grad_values, None, grad_W, None


def _decode_ragged(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """`triton_decode.plain`, reading nothing for slots of value 0. CPU only."""
    some_BK = values_BK != 0  # NaN is some
    counts_B = some_BK.sum(1)
    starts, weights = counts_B.cumsum(0) - counts_B, values_BK[some_BK]
    return embedding_bag(indices_BK[some_BK], W_FE, starts, per_sample_weights=weights, mode="sum")


def input_bias(b_enc_F: Tensor, b_dec_D: Tensor, W_enc_DF: Tensor) -> Tensor:
    """b_enc, with the gradient -W_enc g that b_dec has through x - b_dec: a mat-vec, 2DF."""
    out: Tensor = _InputBias.apply(b_enc_F, b_dec_D, W_enc_DF)  # type: ignore[no-untyped-call]
    return out


class _InputBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_enc_F: Tensor, b_dec_D: Tensor, W_enc_DF: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc_DF)
        ctx.dtype = b_dec_D.dtype
        return b_enc_F.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (W_enc_DF,) = ctx.saved_tensors
        through = (W_enc_DF @ grads[0].to(W_enc_DF.dtype)).neg_().to(ctx.dtype)
        return grads[0], through if ctx.needs_input_grad[1] else None, None
