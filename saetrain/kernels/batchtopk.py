"""Encode, and keep the `keep` largest of all tokens of a batch (BatchTopK), with a sparse backward.

The same tournament as for one token runs over the pre-activations of the whole batch laid end to
end. Tokens keep different numbers of latents: what was found, sorted by token, is a ragged list
(values, latents, offsets), padded here to the largest number of any token, with empty slots of
value 0 at latent 0, so that everything that takes (values, indices) takes it. Costs the (B, F)
pre-activations, but four matrix products less than autograd on dense codes. The width of the
padding is data, so on other devices than the CPU it would have to be waited for: there
`saetrain.activations` keeps the dense form.

bf16: as in encode.py, the product proposes keep + keep/8, float32 decides. Plain twin:
`saetrain.activations.BatchTopK.select`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saetrain.kernels.encode import Slots, decide, encode_with, surplus
from saetrain.kernels.gemm import product
from saetrain.kernels.latents import dot_rows
from saetrain.kernels.topk import exact_topk


def encode_batchtopk(
    x_BD: Tensor,
    W_DF: Tensor,
    b_F: Tensor,
    keep: int,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
    bf16: bool = False,
) -> tuple[Slots, Slots]:
    """((values, indices), (values, indices) of dead ones): `keep` in all, and k_aux a token.

    Slots of value 0 are empty and may repeat a latent. Differentiable in W and b. CPU only.
    """

    def select() -> list[Tensor]:
        if bf16:
            half = torch.bfloat16
            h_BF = product(x_BD.to(half), W_DF.to(half), b_F)
        else:
            h_BF = product(x_BD, W_DF.to(x_BD.dtype), b_F)
        more = min(keep + keep // 8, h_BF.numel()) if bf16 else keep
        values, indices = padded(h_BF, more)
        if bf16:
            exact = dot_rows(x_BD, W_DF.T, indices) + b_F[indices]
            values = largest(exact * (values > 0), keep)
        if not k_aux or dead_F is None:
            return [values, indices, values[:, :0], indices[:, :0]]
        if not bf16:
            return [values, indices, *exact_topk(h_BF.masked_fill_(~dead_F, 0), k_aux)]
        h_BF.masked_fill_(~dead_F, -torch.inf)
        proposed = exact_topk(h_BF, surplus(k_aux, len(b_F)))[1]
        return [values, indices, *decide(x_BD, W_DF.T, b_F, proposed, k_aux, dead_F)]

    return encode_with(select, x_BD, W_DF, b_F)


def encode_batchtopk_of(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    keep: int,
    dead_LF: Sequence[Tensor | None],
    k_aux: int = 0,
) -> list[tuple[Slots, Slots]]:
    """`encode_batchtopk` of each of L layers, given as (x, W, b), but `keep` of all together.

    Float32 decides, whatever autocast says.
    """
    device = layers[0][0].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        h_LBF = torch.stack([product(x, W.to(x.dtype), b) for x, W, b in layers])
        wide, places = padded(h_LBF.flatten(0, 1), keep)
        both_LBK = [t.reshape(*h_LBF.shape[:2], -1) for t in (wide, places)]
        found = [[t.clone() for t in slots] for slots in zip(*both_LBK, strict=True)]
        for slots, h_BF, dead_F in zip(found, h_LBF, dead_LF, strict=True):
            if k_aux and dead_F is not None:
                slots += exact_topk(h_BF.masked_fill_(~dead_F, 0), k_aux)
            else:
                slots += [wide.new_empty(len(h_BF), 0), places.new_empty(len(h_BF), 0)]
    return [
        encode_with(lambda slots=slots: slots, *layer)  # type: ignore[misc]
        for slots, layer in zip(found, layers, strict=True)
    ]


def ragged(h_BF: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, latents, offsets) of the `keep` largest of h that are above 0, by token.

    Token b has the slots offsets[b] .. offsets[b + 1] - 1; offsets is (B + 1,).
    """
    n_tokens, n_latents = h_BF.shape
    values, flat = exact_topk(h_BF.reshape(1, -1), keep)
    flat, order = flat[0][values[0] > 0].sort()
    values = values[0][values[0] > 0][order]
    edges = torch.arange(n_tokens + 1, device=h_BF.device) * n_latents
    return values, flat % n_latents, torch.searchsorted(flat, edges)


def padded(h_BF: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """`ragged` as (B, K) values and indices, K the most that any token has, at least 1."""
    values, latents, offsets = ragged(h_BF, keep)
    counts = offsets.diff()
    token = torch.arange(len(h_BF), device=h_BF.device).repeat_interleave(counts)
    place = torch.arange(len(values), device=h_BF.device) - offsets[token]
    shape = len(h_BF), max(1, int(counts.max()))  # CPU: nothing to wait for
    wide, indices = values.new_zeros(shape), latents.new_zeros(shape)
    wide[token, place] = values
    indices[token, place] = latents
    return wide, indices


def largest(values_BK: Tensor, keep: int) -> Tensor:
    """The values, all but the `keep` largest set to 0."""
    if keep >= values_BK.numel():
        return values_BK
    chosen = values_BK.reshape(-1).topk(keep, sorted=False)[1]
    mask = torch.zeros(values_BK.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
    return values_BK * mask.reshape(values_BK.shape)
