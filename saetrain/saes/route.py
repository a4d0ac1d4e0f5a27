"""RouteSAE: a router chooses, token by token, the layer that one SAE reads (Shi et al. 2025, EMNLP,
arXiv 2503.08200), so that features of all layers share one dictionary at the price of one SAE.

r = what the router makes of the layers x'_l (saetrain.routing);  f = act((r - b_dec) W_enc + b_enc)
r̂ = f W_dec + b_dec,  loss = ||r - r̂||² / ||r||² + penalty(f) + auxk + router_alpha · router loss

Latents, reconstruction and metrics are of r, in standardised units. Differences from the paper,
each an option where it can be one: layers are standardised by the store's statistics instead of
token by token, so that it can be saved; hard routing passes x'_j itself (scale_by_weight: p_j x'_j)
and has a loss of its own for the router, which otherwise learns nothing; b_router. Where gates can
shrink r (soft, scale_by_weight) only reconstruction=nmse keeps that from paying. There is no load
balancing: a router may well end up with one layer, and `layer/HOOK` in the log says so.

Shapes: B tokens, M tokens tried, L layers, D width, F latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saetrain.artefact import ArtefactError, Description, register_kind
from saetrain.codes import Codes
from saetrain.dictionary import Picked, Weights
from saetrain.errors import ConfigError
from saetrain.layers import InferenceLayers, Layers, LayersConfig
from saetrain.progress import Progress
from saetrain.routing import Aggregation, Routing, expected, gates, probabilities, routed
from saetrain.saes.base import Losses, register
from saetrain.sums import total


@dataclass(frozen=True, kw_only=True)
class RouteConfig(LayersConfig):
    aggre: Aggregation = "sum"  # of the layers, for the router
    routing: Routing = "hard"
    scale_by_weight: bool = False  # hard: multiply the chosen layer by its weight
    router_alpha: float | None = None  # weight of the router loss; None: 1 if hard, 0 if soft
    router_tokens: int | None = None  # tokens per step that all layers are tried on; None: B / L
    reconstruction: Literal["nmse", "fvu", "mse", "sse"] = "nmse"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_alpha is not None and not self.router_alpha >= 0:
            raise ConfigError(f"sae.router_alpha: expected 0 or more, got {self.router_alpha}")
        if self.router_tokens is not None and self.router_tokens < 1:
            raise ConfigError(f"sae.router_tokens: expected at least 1, got {self.router_tokens}")
        soft = self.routing == "soft"
        if soft and self.scale_by_weight:
            raise ConfigError(
                "sae.scale_by_weight=true with sae.routing=soft, which weights all layers already"
            )
        if self.router_tokens is not None and self.alpha == 0:
            warnings.warn(
                f"sae.router_tokens={self.router_tokens} has no effect: the router loss is off "
                f"(sae.routing={self.routing}, sae.router_alpha={self.router_alpha})",
                stacklevel=3,
            )
        if self.reconstruction != "nmse" and (soft or self.scale_by_weight):
            warnings.warn(
                f"sae.reconstruction={self.reconstruction} with "
                f"{'sae.routing=soft' if soft else 'sae.scale_by_weight=true'}: the router can "
                "lower the loss by making its output small; sae.reconstruction=nmse prevents that",
                stacklevel=3,
            )
        if self.alpha == 0 and not soft and not self.scale_by_weight:
            raise ConfigError(
                "sae.router_alpha=0 with sae.routing=hard: nothing would train the router. Give a "
                "larger one, or sae.scale_by_weight=true"
            )

    @property
    def alpha(self) -> float:
        """Weight of the router loss."""
        if self.router_alpha is not None:
            return self.router_alpha
        return 1.0 if self.routing == "hard" else 0.0


@register("route", RouteConfig)
class Route(Layers):
    """One SAE for several layers; a router picks the layer to read for each token."""

    cfg: RouteConfig
    W_router: Tensor  # (D, L)
    b_router: Tensor  # (L,)

    def _make_weights(self, mean_D: Tensor) -> None:
        super()._make_weights(mean_D)
        size = self.d_in**-0.5
        start_DL = torch.empty(self.d_in, len(self.hooks_in)).uniform_(-size, size)
        self.W_router = nn.Parameter(start_DL)
        self.b_router = nn.Parameter(torch.zeros(len(self.hooks_in)))

    # -- the maths --------------------------------------------------------------------------------

    def router(self, x_BLD: Tensor) -> Tensor:
        """p (..., L) of standardised layers."""
        return probabilities(x_BLD, self.W_router, self.b_router, self.cfg.aggre)

    def gates(self, p: Tensor) -> Tensor:
        """What layers are multiplied by, (..., L)."""
        return gates(p, self.cfg.routing, self.cfg.scale_by_weight)

    def inputs(self, acts: Mapping[str, Tensor]) -> Tensor:
        """r (..., D)."""
        x_BLD = self.layers(acts)
        return routed(x_BLD, self.gates(self.router(x_BLD)))

    def encode(self, x: Tensor) -> Codes:
        """Latents (..., F) of raw activations x (..., L, D)."""
        x = self.standardise(x)
        r = routed(x, self.gates(self.router(x)))
        return self.activation.infer(self.pre_activations(r, self.weights()))

    def decode(self, codes: Codes) -> Tensor:
        """r̂ (..., D), in standardised units."""
        return self.predict(codes, torch.empty(0), self.weights())

    def pick(self, x_BD: Tensor, w: Weights) -> Picked:
        """As for all, with gradients to the routed vector where it asks for them."""
        if not x_BD.requires_grad:
            return super().pick(x_BD, w)
        h_BF = self.pre_activations(x_BD, w)
        aux, dead_F = self.pick_dead(h_BF)
        return Picked(self.activation.select(h_BF), h_BF, aux, dead_F)

    def levels(self, codes: Codes, w: Weights) -> Iterator[Tensor]:
        """Reconstructions that the loss is the mean of; the last one is the whole one."""
        yield self.predict(codes, torch.empty(0), w)

    # -- loss terms -------------------------------------------------------------------------------

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction`, the penalty, `auxk` and `router` unless off; extras: `fvu` of the
        routed vectors of the batch, `layer/HOOK`, each layer's share of the gates."""
        x_BLD, w = self.layers(acts), self.weights()
        p_BL = self.router(x_BLD)
        r_BD = routed(x_BLD, self.gates(p_BL))
        picked = self.pick(r_BD, w)
        residuals = [r_BD - guess for guess in self.levels(picked.codes, w)]
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        size = torch.stack([self.error_of(e_BD, r_BD) for e_BD in residuals]).mean()
        terms = {"reconstruction": size, **penalty, **self.revival(residuals[-1], picked, w)}
        if self.cfg.alpha:
            terms["router"] = self.cfg.alpha * self.router_loss(x_BLD, p_BL, w)
        extras |= {"fvu": batch_fvu(residuals[-1].detach(), r_BD.detach()), **self._shares(p_BL)}
        return Losses(terms, picked.codes, extras)

    def error_of(self, e_BD: Tensor, r_BD: Tensor) -> Tensor:
        """The residual's size in the unit of `sae.reconstruction`."""
        if self.cfg.reconstruction != "nmse":
            return self.reconstruction(e_BD)
        return relative(e_BD, r_BD).mean()

    def router_loss(self, x_BLD: Tensor, p_BL: Tensor, w: Weights) -> Tensor:
        """Expected NMSE of routing at random with p, over the first tokens of the batch."""
        n_layers = len(self.hooks_in)
        tried = self.cfg.router_tokens or max(1, len(x_BLD) // n_layers)
        with torch.no_grad():
            x_RD = x_BLD[:tried].flatten(0, 1)
            codes = self.activation.select(self.pre_activations(x_RD, w))
            errors = [relative(x_RD - guess, x_RD) for guess in self.levels(codes, w)]
            errors_ML = torch.stack(errors).mean(0).reshape(-1, n_layers)
        return expected(p_BL[:tried], errors_ML)

    def _shares(self, p_BL: Tensor) -> dict[str, Tensor]:
        share_L = gates(p_BL.detach(), self.cfg.routing, False).mean(0)
        return {f"layer/{hook}": share for hook, share in zip(self.hooks_in, share_L, strict=True)}

    def to_inference(self) -> InferenceRoute:
        """Router, weights in the layers' common units, and those units."""
        cfg = self.cfg
        options = {"routing": cfg.routing, "scale_by_weight": cfg.scale_by_weight}
        description, tensors = self.inference_parts("route", **options, **self.more_options())
        scale = 1 / len(self.hooks_in) if cfg.aggre == "mean" else 1.0
        tensors["W_router"] = self.W_router.detach() * scale
        tensors["b_router"] = self.b_router.detach().clone()
        return InferenceRoute(description, tensors)

    def more_options(self) -> dict[str, object]:
        """Of the saved SAE."""
        return {}


def relative(e_BD: Tensor, r_BD: Tensor) -> Tensor:
    """||e||² / ||r||² of each row."""
    return e_BD.square().sum(-1) / r_BD.square().sum(-1)


def batch_fvu(e_BD: Tensor, r_BD: Tensor) -> Tensor:
    """Σ||e||² / Σ||r - mean r||², the mean being the batch's: too low by a factor (B-1)/B."""
    return total(e_BD.square()) / total((r_BD - r_BD.mean(0)).square())


@register_kind("route")
class InferenceRoute(InferenceLayers):
    """Router and SAE: (..., L, D) raw activations in, r̂ (..., D) in standardised units out.

    `options`: routing, scale_by_weight, and group_sizes of a route_matryoshka SAE. `mean` over
    layers is folded into W_router.
    """

    W_router: Tensor  # (D, L)
    b_router: Tensor  # (L,)

    @classmethod
    def check(cls, description: Description) -> None:
        options = dict(description.options)
        routing, scaled = options.pop("routing", None), options.pop("scale_by_weight", None)
        if routing not in ("hard", "soft") or not isinstance(scaled, bool):
            raise ArtefactError(
                f"options of kind=route: expected routing=hard or soft and scale_by_weight=true or "
                f"false, got {description.options}"
            )
        sizes = options.pop("group_sizes", [description.n_latents])
        whole = isinstance(sizes, list) and all(type(n) is int and n > 0 for n in sizes)
        if options or not whole or sum(sizes) != description.n_latents:
            raise ArtefactError(
                f"options of kind=route: expected routing, scale_by_weight and group_sizes that "
                f"add up to n_latents={description.n_latents}, got {description.options}"
            )

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        n_layers = len(description.hooks_in)
        more = {"W_router": (description.d_in, n_layers), "b_router": (n_layers,)}
        return super().shapes(description) | more

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Sizes of the nested groups; one group of all latents for plain routing."""
        return tuple(self._description.options.get("group_sizes", [self.n_latents]))

    def router(self, x: Tensor) -> Tensor:
        """p (..., L) of raw activations x (..., L, D)."""
        return probabilities(self.standardise(x), self.W_router, self.b_router, "sum")

    def gates(self, x: Tensor) -> Tensor:
        """What each standardised layer is multiplied by, (..., L)."""
        options = self._description.options
        return gates(self.router(x), options["routing"], options["scale_by_weight"])

    def encode(self, x: Tensor) -> Codes:
        """Latents (..., F) of raw activations x (..., L, D)."""
        return self.latents_of(routed(self.standardise(x), self.gates(x)))

    def decode(self, codes: Codes) -> Tensor:
        """r̂ (..., D), in standardised units."""
        return self.rows_of(codes)

    def target(self, x: Tensor) -> Tensor:
        """r (..., D) of raw activations x (..., L, D): what `decode` is to give."""
        return routed(self.standardise(x), self.gates(x))

    def layer_shares(self, x: Tensor) -> Tensor:
        """How much of each token each layer gives, (..., L): 0 or 1 for hard routing."""
        return gates(self.router(x), self._description.options["routing"], False)

    def replaced(self, x: Tensor) -> Tensor:
        """x (..., L, D) with the chosen layer of each token replaced by its reconstruction.

        For a second pass of the host: its later layers decide where the first one was to be
        changed. The weight is divided out again. ValueError for soft routing, which chooses none.
        """
        if self._description.options["routing"] == "soft":
            raise ValueError("soft routing mixes layers: no single one can be replaced")
        gate = self.gates(x)[..., None]
        rows = (self.decode(self.encode(x))[..., None, :] / gate) / self.scale[:, None]
        return torch.where(gate > 0, rows + self.center, x.to(rows.dtype))
