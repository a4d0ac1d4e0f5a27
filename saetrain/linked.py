"""Dictionaries between different hooks: an encoder of one or several, a decoder to one or several.

Transcoders, crosscoders and cross-layer transcoders are this class plus their own hooks and norms.
Every hook has its own centre and scale, from the store's statistics:
x'_h = s_h (x_h - c_h) of the inputs and y'_g = s_g (y_g - c_g) of the outputs. Unlike an SAE's, the
encoder does not subtract b_dec, which lives in other units; instead its bias starts at -mean(x') W,
so that pre-activations start centred whatever `sae.center` is.

f = act(x' W_enc + b_enc),  ŷ' = f W_dec + b_dec;  x', ŷ' of several hooks laid end to end
loss = reconstruction(y' - ŷ') + penalty(f) + auxk_alpha · auxk(y' - ŷ')

fvu is the mean over output hooks of their own FVUs, so none counts more for being longer or wider
spread; mse and sse sum over all channels of all hooks, in standardised units. AuxK explains the
residual of all output hooks together. Cost: that of an SAE of the summed widths.

Folding: W_enc <- s W_enc, b_enc <- b_enc - c s W_enc, W_dec <- W_dec / s, b_dec <- b_dec / s + c.

Shapes: B tokens, H input hooks of width D, G output hooks of width E, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saetrain import init
from saetrain.codes import Codes, decode_codes
from saetrain.dictionary import Dictionary, DictionaryConfig, Weights
from saetrain.errors import ConfigError
from saetrain.progress import Progress
from saetrain.saes.base import HookSpace, Losses, check_space
from saetrain.stacking import common_width, end_to_end, joined, split


@dataclass(frozen=True, kw_only=True)
class LinkedConfig(DictionaryConfig):
    center: Literal["none", "mean"] = "mean"
    init_encoder: Literal["tied", "random"] = "random"


class Linked(Dictionary):
    """Dictionary whose outputs are other hooks than its inputs, or several."""

    cfg: LinkedConfig

    in_center: Tensor  # (H·D,)
    in_scale: Tensor  # (H·D,) the same for all channels of a hook
    in_origin: Tensor  # (H·D,) mean of x'
    out_center: Tensor  # (G·E,)
    out_scale: Tensor  # (G·E,)
    out_variance: Tensor  # (G,) total variance of each y'_g

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        hooks_in, hooks_out = cfg.hooks(next(iter(spaces)))
        for space in spaces.values():
            check_space(space, cfg)
        common_width(spaces, hooks_in, self._words()[0])
        common_width(spaces, hooks_out, self._words()[1])

    def _words(self) -> tuple[str, str]:
        """What users type for input hooks and for output hooks."""
        return "sae.hooks_in", "sae.hooks_out"

    def _make_units(self, spaces: Mapping[str, HookSpace]) -> None:
        ins, outs = ([spaces[h] for h in hooks] for hooks in (self.hooks_in, self.hooks_out))
        self.d_out = outs[0].d
        self.in_center, self.in_scale = self._units(ins)
        out_center, out_scale = self._units(outs)
        self.register_buffer("in_origin", self.standardise(torch.cat([s.mean for s in ins])))
        self._out_origin = (torch.cat([s.mean for s in outs]) - out_center) * out_scale
        self.register_buffer("out_center", out_center)
        self.register_buffer("out_scale", out_scale)
        scales_G = out_scale.reshape(len(outs), -1)[:, 0].double()
        variance_G = torch.tensor([s.variance for s in outs], dtype=torch.float64)
        self.register_buffer("out_variance", (variance_G * scales_G**2).float())

    def _units(self, spaces: list[HookSpace]) -> tuple[Tensor, Tensor]:
        """(centres, scales) of every channel of some hooks."""
        cfg, centers, scales = self.cfg, [], []
        for space in spaces:
            centers.append(space.mean.float() * (cfg.center == "mean"))
            length = {"none": 1.0, "sqrt_d": space.d**0.5, "unit": 1.0}[cfg.scale]
            divisor = 1.0 if cfg.scale == "none" else space.mean_norm
            scales.append(torch.full((space.d,), length / divisor))
        return torch.cat(centers), torch.cat(scales)

    def _make_weights(self, mean_D: Tensor) -> None:
        cfg, (rows, norm) = self.cfg, self._start_norms()
        width_in, width_out = len(self.in_center), len(self.out_center)
        self.W_dec = nn.Parameter(init.random_rows(self.n_latents, width_out, rows))
        W_enc = init.transposed(self.W_dec)
        if cfg.init_encoder == "random":
            W_enc = init.transposed(init.random_rows(self.n_latents, width_in, rows))
        elif width_in != width_out:
            raise ConfigError(
                "sae.init_encoder=tied starts the encoder as the decoder's transpose, but inputs "
                f"have width {width_in} and outputs {width_out}: sae.init_encoder=random"
            )
        self.W_enc = nn.Parameter(W_enc * (norm / rows))
        self._make_biases()

    def _make_biases(self) -> None:
        self.b_enc = nn.Parameter(self.W_enc.new_zeros(self.n_latents))
        self.b_dec = nn.Parameter(self.W_enc.new_zeros(len(self.out_center)))
        if self.cfg.init_bias != "zero":
            self.settle_biases(torch.arange(self.n_latents))
            self.b_dec.data += self._out_origin

    # -- the maths --------------------------------------------------------------------------------

    def inputs(self, acts: Mapping[str, Tensor]) -> Tensor:
        """x' (..., H·D)."""
        return self.standardise(end_to_end(acts, self.hooks_in))

    def targets(self, acts: Mapping[str, Tensor]) -> Tensor:
        """y' (..., G·E)."""
        y = end_to_end(acts, self.hooks_out).to(self.out_scale.dtype)
        return (y - self.out_center) * self.out_scale

    def pre_activations(self, x: Tensor, w: Weights) -> Tensor:
        """(..., F) of x' (..., H·D)."""
        return x @ w.W_enc + w.b_enc

    def _encoder_terms(self, x_BD: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        return x_BD, w.b_enc

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), or (..., H, D)."""
        x = self.standardise(joined(x, len(self.hooks_in)))
        return self.activation.infer(self.pre_activations(x, self.weights()))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., E), or (..., G, E), in raw units."""
        w = self.weights()
        return self.raw(decode_codes(codes, w.W_dec) + w.b_dec)

    def raw(self, y: Tensor) -> Tensor:
        """Outputs in standardised units (..., G·E) as `decode` gives them."""
        return split(y / self.out_scale + self.out_center, len(self.hooks_out))

    # -- training ---------------------------------------------------------------------------------

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction`, the penalty by its name, `auxk` unless off; extras: `fvu`, and
        `fvu/HOOK` where there are several output hooks."""
        x_BD, y_BE, w = self.inputs(acts), self.targets(acts), self.weights()
        picked = self.pick(x_BD, w)
        e_BE = y_BE - self.predict(picked.codes, x_BD, w)
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        terms = {"reconstruction": self.reconstruction(e_BE), **penalty}
        terms |= self.revival(e_BE, picked, w)
        return Losses(terms, picked.codes, {**self._fvus(e_BE), **extras})

    def _sse(self, e_BE: Tensor) -> Tensor:
        """(G,) mean over tokens of the squared residual of each output hook."""
        e_BGE = e_BE.reshape(-1, len(self.hooks_out), self.d_out)
        return e_BGE.square().sum(-1).mean(0)

    def reconstruction(self, e_BE: Tensor) -> Tensor:
        """The residual's size in the unit of `sae.reconstruction`."""
        sse_G = self._sse(e_BE)
        if self.cfg.reconstruction == "fvu":
            return (sse_G / self.out_variance).mean()
        return sse_G.sum() / (len(self.out_center) if self.cfg.reconstruction == "mse" else 1)

    def _fvus(self, e_BE: Tensor) -> dict[str, Tensor]:
        fvu_G = self._sse(e_BE.detach()) / self.out_variance
        each = dict(zip(self.hooks_out, fvu_G, strict=True)) if len(fvu_G) > 1 else {}
        return {"fvu": fvu_G.mean(), **{f"fvu/{hook}": v for hook, v in each.items()}}

    # -- around the step --------------------------------------------------------------------------

    def input_origin(self) -> Tensor:
        """(H·D,) mean of x'."""
        return self.in_origin

    @torch.no_grad()
    def settle_biases(self, ids: Tensor) -> None:
        """Encoder biases -mean(x') W of the latents `ids`, so that they start centred."""
        if self.cfg.init_bias != "zero":
            self.b_enc[ids] = -(self.in_origin @ self.W_enc[:, ids])
