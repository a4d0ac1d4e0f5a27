"""MLSAE, one SAE over the rows of several layers (Lawson et al. 2024, arXiv 2409.04185): whether a
latent belongs to one layer or to many becomes a question that can be asked.

Every (token, layer) is a row of its own; f_l = act((x'_l - b_dec) W_enc + b_enc), x̂'_l = f_l W_dec
+ b_dec, and the loss is that of a plain SAE over the B·L rows, penalty and AuxK included. Each
layer is standardised by its own statistics (see `saetrain.layers`), or the last layers, the
longest, would decide what is learned. L0 and k are per row. A latent counts as dead after
`dead_after_tokens` tokens on none of whose layers it fired. Cost: L steps of a plain SAE.

Shapes: B tokens, L layers, N = B·L rows, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from saetrain.artefact import register_kind
from saetrain.codes import Codes, SparseCodes
from saetrain.layers import InferenceLayers, Layers, LayersConfig
from saetrain.progress import Progress
from saetrain.saes.base import Losses, register


@dataclass(frozen=True, kw_only=True)
class MLSAEConfig(LayersConfig):
    """Nothing beyond the layers."""


@register("mlsae", MLSAEConfig)
class MLSAE(Layers):
    """One SAE over the rows of several layers."""

    cfg: MLSAEConfig

    def inputs(self, acts: Mapping[str, Tensor]) -> Tensor:
        """x' of every layer of every token, (N, D)."""
        return self.layers(acts).flatten(0, -2)

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """As a plain SAE's, over all rows; extras: `fvu`, and `fvu/HOOK` of each layer."""
        x_ND, w = self.inputs(acts), self.weights()
        picked = self.pick(x_ND, w)
        e_ND = x_ND - self.predict(picked.codes, x_ND, w)
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        terms = {"reconstruction": self.reconstruction(e_ND), **penalty}
        terms |= self.revival(e_ND, picked, w)
        return Losses(terms, picked.codes, {"fvu": self.fvu(e_ND), **self._each(e_ND), **extras})

    def _each(self, e_ND: Tensor) -> dict[str, Tensor]:
        """FVU of each layer."""
        sse_NL = e_ND.detach().square().sum(-1).reshape(-1, len(self.hooks_in))
        fvu_L = sse_NL.mean(0) / self.layer_variance
        return {f"fvu/{hook}": fvu for hook, fvu in zip(self.hooks_in, fvu_L, strict=True)}

    def note_firing(self, codes: Codes) -> None:
        """As for all, with L rows to a token."""
        rows = (codes.values if isinstance(codes, SparseCodes) else codes).shape[:-1].numel()
        self.tokens_since_fired -= rows - rows // len(self.hooks_in)
        super().note_firing(codes)

    def to_inference(self) -> InferenceMLSAE:
        """Weights in the layers' common units, and those units."""
        return InferenceMLSAE(*self.inference_parts("mlsae"))


@register_kind("mlsae")
class InferenceMLSAE(InferenceLayers):
    """f_l = act((x'_l - b_dec) W_enc + b_enc), x̂_l = (f_l W_dec + b_dec) / scale_l + center_l."""

    def encode(self, x: Tensor) -> Codes:
        """Latents (..., L, F) of raw activations x (..., L, D)."""
        return self.latents_of(self.standardise(x))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., L, D) in raw units of latents (..., L, F)."""
        return self.rows_of(codes) / self.scale[:, None] + self.center
