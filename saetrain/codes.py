"""Latent activations: dense tensors, or (values, indices) where at most K of F latents fire.

TopK-like codes stay sparse through decode and backward; nothing dense of size batch x latents is
made after the selection unless a caller asks for it with `dense`. A training step costs
2BDF + 8BKD operations instead of 12BDF: only the encoder's forward is a full matrix product.
`select_topk` is the fast path of `topk_codes`, which autograd differentiates densely; what it is
made of is in `saetrain.kernels`.

Shapes: ... any leading dimensions (usually B tokens), D input width, E output width, F latents,
K active slots, A auxiliary slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.kernels import decode as kernels_decode
from saetrain.kernels.above import encode_above
from saetrain.kernels.batchtopk import encode_batchtopk, encode_batchtopk_of
from saetrain.kernels.decode import decode
from saetrain.kernels.encode import encode_topk
from saetrain.kernels.latents import may_count
from saetrain.kernels.topk import exact_topk


@dataclass(frozen=True)
class SparseCodes:
    """At most K non-zero latents per token. A slot with value 0 is an unused slot."""

    values: Tensor  # (..., K), non-negative
    indices: Tensor  # (..., K), int64 in [0, n_latents), distinct where values are not 0
    n_latents: int
    used: Tensor | None = None  # (..., K) bool, the slots that get gradients; None: all. CPU only

    def dense(self) -> Tensor:
        """(..., F) with zeros elsewhere. Costs batch x latents memory."""
        out = self.values.new_zeros(*self.values.shape[:-1], self.n_latents)
        return out.scatter_add_(-1, self.indices, self.values)


Codes = Tensor | SparseCodes


def dense(codes: Codes) -> Tensor:
    """(..., F) whatever the form."""
    return codes.dense() if isinstance(codes, SparseCodes) else codes


def decode_codes(codes: Codes, W_dec_FE: Tensor) -> Tensor:
    """codes @ W_dec: (..., E). Sparse codes gather only the rows that fire."""
    if not isinstance(codes, SparseCodes):
        return codes @ W_dec_FE
    lead, k = codes.values.shape[:-1], codes.values.shape[-1]
    used = None if codes.used is None else codes.used.reshape(-1, k)
    out = decode(codes.values.reshape(-1, k), codes.indices.reshape(-1, k), W_dec_FE, used)
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


def largest_per_token(codes: Codes) -> Codes:
    """Codes (B, F); of several rows per token, (B, rows, F), the largest value of each latent."""
    if not isinstance(codes, SparseCodes):
        return codes if codes.dim() == 2 else codes.amax(1)
    if codes.values.dim() == 2:
        return codes
    values, indices = codes.values.flatten(1), codes.indices.flatten(1)
    out = values.new_zeros(len(values), codes.n_latents)
    return out.scatter_reduce_(1, indices, values, "amax")


def topk_codes(h: Tensor, k: int) -> SparseCodes:
    """relu(topk(h)): the k largest pre-activations h (..., F), those below zero cut to 0."""
    if may_count(h) and not (h.requires_grad and torch.is_grad_enabled()):
        values, indices = exact_topk(h.reshape(-1, h.shape[-1]), k)
        values, indices = (t.reshape(*h.shape[:-1], k) for t in (values, indices))
    else:
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
    found: list[Tensor] | None = None,
) -> tuple[SparseCodes, SparseCodes | None]:
    """`topk_codes(x @ W_enc + b_enc, k)` with a sparse backward, and the AuxK candidates.

    `found`: what `saetrain.kernels.encode.slots_of` gave for x, where that is known already.

    With `dead_F` (bool) also the `k_aux` largest positive pre-activations among dead latents (slots
    left over have value 0 and no gradient). Gradients reach W_enc and b_enc through both; x_BD is
    data and gets none. Under bf16 autocast the product is made in bfloat16 and the values in the
    type of x, see `saetrain.kernels.encode`. Raises ValueError if x_BD asks for a gradient: use
    `topk_codes` there.
    """
    if x_BD.requires_grad:
        raise ValueError("select_topk gives no gradient to its input: use topk_codes")
    if dead_F is None:
        k_aux = 0
    codes, aux = encode_topk(x_BD, W_enc_DF, b_enc_F, k, dead_F, k_aux, _autocast(x_BD), found)
    n_latents = W_enc_DF.shape[1]
    return SparseCodes(*codes, n_latents), SparseCodes(*aux, n_latents) if k_aux else None


def select_batchtopk(
    x_BD: Tensor,
    W_enc_DF: Tensor,
    b_enc_F: Tensor,
    keep: int,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
) -> tuple[SparseCodes, SparseCodes | None]:
    """relu of the `keep` largest pre-activations of all tokens, as `select_topk` otherwise.

    Slots of value 0 may repeat a latent. For the CPU: elsewhere its width would be waited for.
    """
    if x_BD.requires_grad:
        raise ValueError("select_batchtopk gives no gradient to its input: use BatchTopK.select")
    k_aux = 0 if dead_F is None else k_aux
    codes, aux = encode_batchtopk(x_BD, W_enc_DF, b_enc_F, keep, dead_F, k_aux, _autocast(x_BD))
    return _batchtopk_codes(codes, W_enc_DF.shape[1]), _aux_codes(aux, W_enc_DF.shape[1])


def select_batchtopk_of(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    keep: int,
    dead_LF: Sequence[Tensor | None],
    k_aux: int,
) -> list[tuple[SparseCodes, SparseCodes | None]]:
    """`select_batchtopk` of several layers (x, W_enc, b_enc), which share `keep`."""
    size = layers[0][1].shape[1]
    found = encode_batchtopk_of(layers, keep, dead_LF, k_aux)
    return [(_batchtopk_codes(codes, size), _aux_codes(aux, size)) for codes, aux in found]


def _batchtopk_codes(slots: tuple[Tensor, Tensor], n_latents: int) -> SparseCodes:
    return SparseCodes(*slots, n_latents, slots[0].detach() > 0)


def _aux_codes(slots: tuple[Tensor, Tensor], n_latents: int) -> SparseCodes | None:
    return SparseCodes(*slots, n_latents) if slots[0].shape[-1] else None


def select_above(
    x_BD: Tensor,
    W_enc_DF: Tensor,
    b_enc_F: Tensor,
    floor_F: Tensor,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
) -> tuple[SparseCodes, SparseCodes | None] | None:
    """The pre-activations above `floor_F` as codes, with gradients to W_enc and b_enc, and AuxK's.

    Values of 0 and less are values, too: `used` says which slots are some. None where so many are
    above that dense codes are cheaper. For the CPU, and not for inputs that ask for a gradient.
    """
    k_aux = 0 if dead_F is None else k_aux
    found = encode_above(x_BD, W_enc_DF, b_enc_F, floor_F, dead_F, k_aux, _autocast(x_BD))
    if found is None:
        return None
    codes, used, aux = found
    return SparseCodes(*codes, W_enc_DF.shape[1], used), _aux_codes(aux, W_enc_DF.shape[1])


def input_bias(b_enc_F: Tensor, b_dec_D: Tensor, W_enc_DF: Tensor) -> Tensor:
    """b_enc, carrying the gradient that b_dec gets through the encoder's input x - b_dec.

    Use with x - b_dec.detach(). The gradient is -W_enc Σ_n ∂h_n and costs 2DF instead of the 2BDF
    of differentiating the input per token.
    """
    return kernels_decode.input_bias(b_enc_F, b_dec_D, W_enc_DF)


def _autocast(x: Tensor) -> bool:
    """Whether products with x are to be made in bfloat16."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return known and torch.get_autocast_dtype(device) == torch.bfloat16


def ragged_pays(x: Tensor) -> bool:
    """Whether lists whose length is data may be made of x, which must ask for no gradient."""
    return may_count(x) and not x.requires_grad


def prefer_dense(k: int, n_latents: int) -> bool:
    """Whether a matrix product beats gathering rows: from about one latent in 16 on (measured)."""
    return 16 * k >= n_latents
