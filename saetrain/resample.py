"""Resampling of dead latents (Bricken et al. 2023, "Neuron resampling"; the loss here is that of
one batch, not of 819,200 inputs).

Tokens are drawn with probability ∝ (their squared error)². Each dead latent takes one: its decoder
row becomes the target's direction from b_dec, its encoder column the input's (the same for an SAE)
at 0.2 of the mean length of living columns, its biases what they start as. Adam must forget its
moments there, so the trainer is told what changed. Bias: at most one latent per token of the batch
is revived; the rest stay dead.

Shapes: B tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from saetrain.dictionary import Dictionary
    from saetrain.saes.base import Replaced

ENCODER_SHARE = 0.2


@torch.no_grad()
def resample(sae: Dictionary, acts: Mapping[str, Tensor]) -> Replaced:
    """Give dead latents new weights; parameter name -> index of what was replaced."""
    x_BD, y_BE, w = sae.inputs(acts).flatten(0, -2), sae.targets(acts).flatten(0, -2), sae.weights()
    codes = sae.activation.select(sae.pre_activations(x_BD, w))
    errors_B = (y_BE - sae.predict(codes, x_BD, w)).square().sum(-1)
    weights_B = errors_B.square()
    ids = sae.dead.nonzero().squeeze(1)[: int((weights_B > 0).sum())]
    if not len(ids):
        return {}
    tokens = torch.multinomial(weights_B, len(ids))
    seen_ND = normalize(x_BD[tokens] - sae.input_origin(), dim=1)
    missed_NE = normalize(y_BE[tokens] - w.b_dec, dim=1)
    alive_F = ~sae.dead if not sae.dead.all() else sae.dead
    lengths_F = sae.W_enc.norm(dim=0)
    sae.W_dec[ids] = missed_NE * sae.W_dec.norm(dim=1)[alive_F].mean()
    sae.W_enc[:, ids] = seen_ND.T * (ENCODER_SHARE * lengths_F[alive_F].mean())
    replaced: Replaced = {"W_dec": (ids,), "W_enc": (..., ids)}
    for name, value in sae.fresh_vectors().items():
        dict(sae.named_parameters())[name][ids] = value
        replaced[name] = (ids,)
    sae.settle_biases(ids)
    sae.tokens_since_fired[ids] = 0
    return replaced
