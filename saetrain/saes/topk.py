"""TopK SAE: per token, only the k largest pre-activations stay (Gao et al. 2024, arXiv 2406.04093).

Sparsity is set, not traded: no L1, so no shrinkage of the latents, and L0 = k by construction. The
price is dead latents, those that never win; AuxK lets the dead ones explain what the living left
over. A step costs one full matrix product and a selection, the rest is proportional to k; AuxK adds
a second selection and a product while something is dead (on a GPU always, to save a wait).

f = relu(topk((x' - b_dec) W_enc + b_enc)),  x̂' = f W_dec + b_dec,  rows of W_dec of length 1
loss = reconstruction + auxk_alpha · auxk

Shapes: B tokens, D width, F latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from saetrain.artefact import InferenceSAE, fold
from saetrain.codes import (
    Codes,
    SparseCodes,
    decode_codes,
    input_bias,
    select_topk,
    topk_codes,
)
from saetrain.errors import ConfigError
from saetrain.init import random_rows, remove_parallel_grad, renormalise_rows, transposed
from saetrain.losses import auxk, reconstruction
from saetrain.saes.base import (
    SAE,
    HookSpace,
    Losses,
    Progress,
    SAEConfig,
    check_autoencoder,
    register,
)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    k: int  # latents that fire per token
    aux_k: int | None = None  # dead latents in AuxK; None: half the input width; 0: no AuxK
    auxk_alpha: float = 1 / 32  # weight of AuxK in the loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"sae.k: expected at least 1, got {self.k}")
        if self.n_latents is not None and self.k > self.n_latents:
            raise ConfigError(f"sae.k={self.k} is larger than sae.n_latents={self.n_latents}")
        if self.aux_k is not None and self.aux_k < 0:
            raise ConfigError(f"sae.aux_k: expected 0 (off) or more, got {self.aux_k}")
        if self.auxk_alpha < 0:
            raise ConfigError(f"sae.auxk_alpha: expected 0 (off) or more, got {self.auxk_alpha}")
        if self.aux_k and self.auxk_alpha == 0:
            warnings.warn(f"sae.aux_k={self.aux_k} has no effect: sae.auxk_alpha=0", stacklevel=3)


@register("topk", TopKConfig)
class TopK(SAE):
    """Keeps the k largest pre-activations per token; AuxK revives dead latents."""

    cfg: TopKConfig

    def __init__(self, cfg: TopKConfig, spaces: Mapping[str, HookSpace]) -> None:
        check_autoencoder(cfg, spaces, self.name)
        super().__init__(cfg, spaces)
        if cfg.k > self.n_latents:
            raise ConfigError(
                f"sae.k={cfg.k} is larger than sae.n_latents={self.n_latents} "
                f"(sae.expansion_factor={cfg.expansion_factor} x width {self.d_in})"
            )
        aux_k = max(1, self.d_in // 2) if cfg.aux_k is None else cfg.aux_k
        self.aux_k = min(aux_k, self.n_latents) if cfg.auxk_alpha else 0
        mean_D = spaces[self.hooks_in[0]].mean.to(self.in_center)
        self.W_dec = nn.Parameter(random_rows(self.n_latents, self.d_in))
        self.W_enc = nn.Parameter(transposed(self.W_dec))
        self.b_enc = nn.Parameter(self.W_dec.new_zeros(self.n_latents))
        self.b_dec = nn.Parameter(self.standardise(mean_D))

    def encode(self, x: Tensor) -> SparseCodes:
        """At most k latents of raw activations x (..., D)."""
        return topk_codes((self.standardise(x) - self.b_dec) @ self.W_enc + self.b_enc, self.cfg.k)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., D) in raw units."""
        return self.unstandardise(decode_codes(codes, self.W_dec) + self.b_dec)

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction` and, unless it is off, `auxk`; extras: `fvu`."""
        x_BD = self.standardise(acts[self.hooks_in[0]])
        codes, aux, dead_F = self._select(x_BD - self.b_dec.detach())
        e_BD = x_BD - (decode_codes(codes, self.W_dec) + self.b_dec)
        kind, variance = self.cfg.reconstruction, self.in_variance
        terms = {"reconstruction": reconstruction(e_BD, kind, variance, self.d_in)}
        if dead_F is not None and aux is not None:
            terms["auxk"] = self.cfg.auxk_alpha * auxk(e_BD, aux, self.W_dec, dead_F)
        elif self.aux_k:
            terms["auxk"] = e_BD.new_zeros(())
        return Losses(terms, codes, {"fvu": reconstruction(e_BD.detach(), "fvu", variance, 0)})

    def _select(self, x_BD: Tensor) -> tuple[SparseCodes, SparseCodes | None, Tensor | None]:
        """Codes, AuxK codes, and the mask of dead latents that they were chosen from."""
        bias_F = input_bias(self.b_enc, self.b_dec, self.W_enc)
        dead_F = self._aux_candidates()
        if dead_F is None or dead_F.device.type != "cpu" or int(dead_F.sum()) > self.aux_k:
            return *select_topk(x_BD, self.W_enc, bias_F, self.cfg.k, dead_F, self.aux_k), dead_F
        # All dead latents are chosen: no second search over all of them (a GPU would wait here).
        dead = dead_F.nonzero().squeeze(1)
        values = (x_BD @ self.W_enc[:, dead] + bias_F[dead]).relu()
        aux = SparseCodes(values, dead.expand(len(x_BD), -1), self.n_latents)
        return select_topk(x_BD, self.W_enc, bias_F, self.cfg.k)[0], aux, dead_F

    def _aux_candidates(self) -> Tensor | None:
        """Mask of dead latents, or None where AuxK is off or known to be 0 without asking a GPU."""
        if not self.aux_k:
            return None
        dead_F = self.dead
        return None if dead_F.device.type == "cpu" and not dead_F.any() else dead_F

    def before_step(self) -> None:
        """Take the radial part from the decoder's gradient."""
        remove_parallel_grad(self.W_dec)

    def after_step(self) -> None:
        """Scale decoder rows back to length 1."""
        renormalise_rows(self.W_dec)

    def to_inference(self) -> InferenceSAE:
        """Folded weights in raw units."""
        return fold(self, activation="topk", k=self.cfg.k)
