"""The plain sparse autoencoder: one encoder, any activation, any penalty, one decoder.

f = act((x' - b_dec) W_enc + b_enc),  x̂' = f W_dec + b_dec
loss = reconstruction + penalty(f) + auxk_alpha · auxk

Which SAE of the literature it is follows from its parts; conf/sae has a file for each: vanilla and
relu (relu with l1), topk, batchtopk, jumprelu (with l0). An L1 trades reconstruction for sparsity
and shrinks latents; TopK-like activations set L0 instead, at the price of dead latents, which AuxK
revives by letting the dead ones explain what the living left over. Cost of a step: one full
product and a selection, the rest is proportional to L0. Dense codes cost the full 10BDF operations:
those of relu and jumprelu while more than one latent in 16 fires; on GPUs these and batchtopk.

Shapes: B tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from saetrain.artefact import InferenceSAE
from saetrain.codes import decode_codes
from saetrain.dictionary import Dictionary, DictionaryConfig
from saetrain.fold import fold
from saetrain.progress import Progress
from saetrain.saes.base import Losses, register


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(DictionaryConfig):
    """Nothing beyond the parts."""


@register("sae", AutoencoderConfig)
class Autoencoder(Dictionary):
    """One encoder and one decoder around any activation and penalty: vanilla, topk, jumprelu, …"""

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction`, the penalty by its name, and `auxk` unless off; extras: `fvu`."""
        x_BD, w = self.standardise(acts[self.hooks_in[0]]), self.weights()
        picked = self.pick(x_BD, w)
        e_BD = x_BD - (decode_codes(picked.codes, w.W_dec) + w.b_dec)
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        terms = {"reconstruction": self.reconstruction(e_BD), **penalty}
        terms |= self.revival(e_BD, picked, w)
        return Losses(terms, picked.codes, {"fvu": self.fvu(e_BD), **extras})

    def to_inference(self) -> InferenceSAE:
        """Folded weights in raw units."""
        return fold(self, self.weights(), self.activation.form())
