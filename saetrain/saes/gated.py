"""Gated SAE: one path decides which latents fire, another how strongly (Rajamanoharan et al. 2024,
arXiv 2404.16014). The penalty acts on the gate alone, so magnitudes are not shrunk by it.

π = (x' - b_dec) W_enc;  gate g = act(π + b_gate), magnitude m = relu(π exp(r_mag) + b_mag)
f = 1[g > 0] m,  x̂' = f W_dec + b_dec
loss = reconstruction(x' - x̂') + penalty(g) + gate_alpha · reconstruction(x' - x̂'_gate)
x̂'_gate = g W_dec + b_dec with the decoder held fixed (eq. 8): it trains the gate, whose step
function passes no gradient, and must not pull the decoder towards shrunken latents.

With act = relu this is the paper's; any other activation decides the gate in the same way. One
product with W_enc serves both paths. Cost: that of a dense SAE and a second decoding.

Shapes: B tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saetrain.artefact import Description, Inference, register_kind
from saetrain.codes import Codes, SparseCodes, decode_codes, input_bias
from saetrain.dictionary import Dictionary, DictionaryConfig, Weights
from saetrain.errors import ConfigError
from saetrain.fold import origin
from saetrain.progress import Progress
from saetrain.saes.base import SAE, Losses, register


@dataclass(frozen=True, kw_only=True)
class GatedConfig(DictionaryConfig):
    auxk_alpha: float = 0.0
    gate_alpha: float = 1.0  # weight of the gate's own reconstruction

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auxk_alpha:
            raise ConfigError(
                f"sae.auxk_alpha={self.auxk_alpha} with sae.name=gated: its auxiliary loss is the "
                "gate's. Set sae.auxk_alpha=0; sae.resample_every revives dead latents"
            )
        if not self.gate_alpha > 0:
            raise ConfigError(
                f"sae.gate_alpha: expected more than 0, got {self.gate_alpha}: nothing else than "
                "the gate's reconstruction keeps gates open"
            )


@register("gated", GatedConfig)
class Gated(Dictionary):
    """Separate gate and magnitude; the penalty acts on the gate, so latents do not shrink."""

    cfg: GatedConfig
    b_gate: Tensor  # (F,)
    b_mag: Tensor  # (F,)
    r_mag: Tensor  # (F,)

    _gate: Codes | None = None  # of the step in progress

    def _make_encoder_biases(self) -> None:
        zeros = self.W_dec.detach().new_zeros(self.n_latents)
        for name in ("b_gate", "b_mag", "r_mag"):
            self.register_parameter(name, nn.Parameter(zeros.clone()))

    def weights(self) -> Weights:
        """Effective weights; b_enc is the gate's bias."""
        if self.cfg.decoder_norm == "unit":
            return Weights(self.W_enc, self.b_gate, self.W_dec, self.b_dec)
        norm_F = self.W_dec.norm(dim=1)
        return Weights(
            self.W_enc * norm_F, self.b_gate * norm_F, self.W_dec / norm_F[:, None], self.b_dec
        )

    def magnitude_bias(self) -> Tensor:
        """Effective b_mag (F,)."""
        free = self.cfg.decoder_norm == "free"
        return self.b_mag * self.W_dec.norm(dim=1) if free else self.b_mag

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D)."""
        w = self.weights()
        pi = (self.standardise(x) - w.b_dec) @ w.W_enc
        gate = self.activation.infer(pi + w.b_enc)
        return gated_codes(gate, pi, self.r_mag, self.magnitude_bias())

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction`, the penalty on the gate, `gate`; extras: `fvu`."""
        x_BD, w = self.standardise(acts[self.hooks_in[0]]), self.weights()
        shift_F = input_bias(torch.zeros_like(w.b_enc), self.b_dec, w.W_enc)
        pi_BF = (x_BD - self.b_dec.detach()) @ w.W_enc + shift_F
        pre_BF = pi_BF + w.b_enc
        gate = self.activation.select(pre_BF)
        codes = gated_codes(gate, pi_BF, self.r_mag, self.magnitude_bias())
        e_BD = x_BD - (decode_codes(codes, w.W_dec) + w.b_dec)
        gate_e_BD = x_BD - (decode_codes(gate, w.W_dec.detach()) + w.b_dec.detach())
        self._gate = gate if isinstance(gate, SparseCodes) else gate.detach()
        penalty, extras = self.sparsity(gate, pre_BF, progress)
        terms = {"reconstruction": self.reconstruction(e_BD), **penalty}
        terms["gate"] = self.cfg.gate_alpha * self.reconstruction(gate_e_BD)
        return Losses(terms, codes, {"fvu": self.fvu(e_BD), **extras})

    def note_firing(self, codes: Codes) -> None:
        """As for all; the activation sees the gate, which is what it selected."""
        SAE.note_firing(self, codes)
        if self._gate is not None:
            self.activation.observe(self._gate)
            self._gate = None

    def to_inference(self) -> InferenceGated:
        """Folded weights in raw units; the magnitudes' scale r_mag stays separate."""
        w, form, s = self.weights(), self.activation.form(), self.in_scale
        tensors = {
            "W_enc": w.W_enc * s,
            "b_gate": w.b_enc,
            "b_mag": self.magnitude_bias(),
            "r_mag": self.r_mag,
            "W_dec": w.W_dec / s,
            "b_dec": w.b_dec / s + self.in_center,
        }
        if form.threshold is not None:
            tensors["threshold"] = form.threshold
        description = Description(
            kind="gated",
            activation=form.activation,
            k=form.k,
            d_in=self.d_in,
            n_latents=self.n_latents,
            d_out=self.d_in,
            hooks_in=self.hooks_in,
            hooks_out=self.hooks_out,
            source=origin(self),
        )
        return InferenceGated(description, {n: t.detach().clone() for n, t in tensors.items()})


@register_kind("gated")
class InferenceGated(Inference):
    """A gated SAE, tensors named as in SAELens; `activation` is the gate's, relu in the paper."""

    W_enc: Tensor  # (D, F)
    b_gate: Tensor  # (F,)
    b_mag: Tensor  # (F,)
    r_mag: Tensor  # (F,)
    W_dec: Tensor  # (F, D)
    b_dec: Tensor  # (D,)

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        d, n_latents = description.d_in, description.n_latents
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n_latents), "W_dec": (n_latents, d)}
        names = ["b_gate", "b_mag", "r_mag"]
        names += ["threshold"] if description.activation == "jumprelu" else []
        return shapes | dict.fromkeys(names, (n_latents,)) | {"b_dec": (d,)}

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), in the weights' dtype."""
        pi = (x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc
        return gated_codes(self.form()(pi + self.b_gate), pi, self.r_mag, self.b_mag)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., D) in raw units, in the weights' dtype."""
        return decode_codes(codes, self.W_dec) + self.b_dec


def gated_codes(gate: Codes, pi: Tensor, r_mag_F: Tensor, b_mag_F: Tensor) -> Codes:
    """relu(π exp(r_mag) + b_mag) where the gate is above 0; sparse where the gate is."""
    if not isinstance(gate, SparseCodes):
        return (pi * r_mag_F.exp() + b_mag_F).relu() * (gate > 0)
    at = gate.indices
    values = (pi.gather(-1, at) * r_mag_F.exp()[at] + b_mag_F[at]).relu() * (gate.values > 0)
    return SparseCodes(values, at, gate.n_latents)
