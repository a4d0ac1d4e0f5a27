"""Resampling of dead latents (Bricken et al. 2023, "Neuron resampling"; the loss here is that of
one batch, not of 819,200 inputs).

Tokens are drawn with probability ∝ (their squared error)². Each dead latent takes one: its decoder
row becomes the token's direction from b_dec, its encoder column the same direction at 0.2 of the
mean length of living columns, its biases 0. Adam must forget its moments there, so the trainer is
told what changed. Bias: at most one latent per token of the batch is revived; the rest stay dead.

Shapes: B tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saetrain.codes import decode_codes

if TYPE_CHECKING:
    from saetrain.dictionary import Dictionary
    from saetrain.saes.base import Replaced

ENCODER_SHARE = 0.2


@torch.no_grad()
def resample(sae: Dictionary, acts: Mapping[str, Tensor]) -> Replaced:
    """Give dead latents new weights; parameter name -> index of what was replaced."""
    x_BD, w = sae.standardise(acts[sae.hooks_in[0]]), sae.weights()
    x_BD = x_BD.reshape(-1, x_BD.shape[-1])
    codes = sae.activation.select((x_BD - w.b_dec) @ w.W_enc + w.b_enc)
    errors_B = (x_BD - decode_codes(codes, w.W_dec) - w.b_dec).square().sum(-1)
    weights_B = errors_B.square()
    ids = sae.dead.nonzero().squeeze(1)[: int((weights_B > 0).sum())]
    if not len(ids):
        return {}
    tokens = torch.multinomial(weights_B, len(ids))
    direction_ND = torch.nn.functional.normalize(x_BD[tokens] - w.b_dec, dim=1)
    alive_F = ~sae.dead if not sae.dead.all() else sae.dead
    lengths_F = sae.W_enc.norm(dim=0)
    sae.W_dec[ids] = direction_ND * sae.W_dec.norm(dim=1)[alive_F].mean()
    sae.W_enc[:, ids] = direction_ND.T * (ENCODER_SHARE * lengths_F[alive_F].mean())
    replaced: Replaced = {"W_dec": (ids,), "W_enc": (..., ids)}
    for name, value in sae.fresh_vectors().items():
        dict(sae.named_parameters())[name][ids] = value
        replaced[name] = (ids,)
    sae.tokens_since_fired[ids] = 0
    return replaced
