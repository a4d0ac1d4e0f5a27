"""ReLU SAE with an L1 penalty (Bricken et al. 2023; Anthropic, Circuits Updates, April 2024).

L1 trades reconstruction for sparsity: L0 follows from `l1_coefficient`, and latents shrink below
the values that would reconstruct best. Nothing revives dead latents; the coefficient's warm-up is
what keeps them few. Latents are dense by nature, so a step costs the full 10BDF operations.

f = relu((x' - b_dec) W_enc + b_enc),  x̂' = f W_dec + b_dec
loss = reconstruction + l1_coefficient · warm-up · mean_n Σ_i f_i ||w_i||

`decoder_norm_weighted=false` drops ||w_i|| and holds rows of W_dec at length 1 instead; with
reconstruction=mse and l1_warmup_fraction=0 the loss is MSE + λ·L1.

Shapes: B tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saetrain.artefact import InferenceSAE, fold
from saetrain.codes import Codes, decode_codes, input_bias
from saetrain.errors import ConfigError
from saetrain.init import random_rows, remove_parallel_grad, renormalise_rows, transposed
from saetrain.losses import l1, reconstruction
from saetrain.saes.base import (
    SAE,
    HookSpace,
    Losses,
    Progress,
    SAEConfig,
    check_autoencoder,
    register,
)

FREE_NORM = 0.1  # length of decoder rows at the start when they are free to grow


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(SAEConfig):
    # λ, for reconstruction=fvu and scale=sqrt_d. Measured on a small GPT-NeoX's residual stream:
    # 0.02 gave L0 51 at d=256 (FVU 0.20, 500 steps) and L0 37 at d=64 (FVU 0.11, 1500 steps);
    # twice that gave about 2/3 of the L0 and twice the FVU.
    l1_coefficient: float = 0.02
    l1_warmup_fraction: float = 0.05  # of training, in which λ grows linearly from 0
    decoder_norm_weighted: bool = True  # penalise f_i ||w_i||; false: f_i, with ||w_i|| = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.l1_coefficient >= 0:
            raise ConfigError(f"sae.l1_coefficient: expected 0 or more, got {self.l1_coefficient}")
        if not 0 <= self.l1_warmup_fraction <= 1:
            raise ConfigError(
                f"sae.l1_warmup_fraction: expected 0 to 1, got {self.l1_warmup_fraction}"
            )


@register("relu", ReLUConfig)
class ReLU(SAE):
    """ReLU latents held sparse by an L1 penalty; the vanilla SAE."""

    cfg: ReLUConfig

    def __init__(self, cfg: ReLUConfig, spaces: Mapping[str, HookSpace]) -> None:
        check_autoencoder(cfg, spaces, self.name)
        super().__init__(cfg, spaces)
        norm = FREE_NORM if cfg.decoder_norm_weighted else 1.0
        mean_D = spaces[self.hooks_in[0]].mean.to(self.in_center)
        self.W_dec = nn.Parameter(random_rows(self.n_latents, self.d_in, norm))
        self.W_enc = nn.Parameter(transposed(self.W_dec))
        self.b_enc = nn.Parameter(self.W_dec.new_zeros(self.n_latents))
        self.b_dec = nn.Parameter(self.standardise(mean_D))

    def encode(self, x: Tensor) -> Tensor:
        """Dense non-negative latents (..., F) of raw activations x (..., D)."""
        return ((self.standardise(x) - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., D) in raw units."""
        return self.unstandardise(decode_codes(codes, self.W_dec) + self.b_dec)

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction` and `l1`; extras: `fvu`, and `l1_coefficient` as warmed up so far."""
        cfg, x_BD = self.cfg, self.standardise(acts[self.hooks_in[0]])
        bias_F = input_bias(self.b_enc, self.b_dec, self.W_enc)
        f_BF = ((x_BD - self.b_dec.detach()) @ self.W_enc + bias_F).relu()
        e_BD = x_BD - (decode_codes(f_BF, self.W_dec) + self.b_dec)
        norms_F = self.W_dec.norm(dim=1) if cfg.decoder_norm_weighted else None
        coefficient = cfg.l1_coefficient * self.warmup(progress)
        terms = {
            "reconstruction": reconstruction(e_BD, cfg.reconstruction, self.in_variance, self.d_in),
            "l1": coefficient * l1(f_BF, norms_F),
        }
        extras = {
            "fvu": reconstruction(e_BD.detach(), "fvu", self.in_variance, 0),
            "l1_coefficient": torch.full((), coefficient, device=x_BD.device),
        }
        return Losses(terms, f_BF, extras)

    def warmup(self, progress: Progress) -> float:
        """Factor on λ: linear from 0 to 1 over the first `l1_warmup_fraction` of training."""
        if self.cfg.l1_warmup_fraction == 0:
            return 1.0
        return min(1.0, progress.fraction / self.cfg.l1_warmup_fraction)

    def before_step(self) -> None:
        """With unit-norm rows: take the radial part from the decoder's gradient."""
        if not self.cfg.decoder_norm_weighted:
            remove_parallel_grad(self.W_dec)

    def after_step(self) -> None:
        """With unit-norm rows: scale them back to length 1."""
        if not self.cfg.decoder_norm_weighted:
            renormalise_rows(self.W_dec)

    def to_inference(self) -> InferenceSAE:
        """Folded weights in raw units."""
        return fold(self, activation="relu")
