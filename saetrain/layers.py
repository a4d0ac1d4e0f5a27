"""Several layers of the same token through one dictionary: what route, route_matryoshka and mlsae
share. Layers have one width and units of their own, from the store's statistics:

x'_l = s_l (x_l - c_l),  c_l the layer's mean (center=mean) or 0,
s_l = √D / √(E||x_l - c_l||²) for scale=sqrt_d with center=mean, √D / E||x_l|| without.

So no layer counts more for being longer; norms grow several-fold through a residual stream. One
encoder cannot carry one scale per layer, so the saved SAE keeps `center` and `scale` as tensors,
takes and gives raw activations, and `single(hook)` folds those of one layer into a plain SAE, for
everything that expects one. The layers are `sae.hooks_in`, or a range of the numbers in the names
of hooks; the saved SAE lists them one by one, so no later default can move them.

Shapes: B tokens, L layers, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from actcache.store.hooknames import canonical, parse_alias
from saetrain.artefact import Description, Inference, InferenceSAE
from saetrain.codes import Codes, decode_codes
from saetrain.dictionary import Dictionary, DictionaryConfig
from saetrain.errors import ConfigError
from saetrain.fold import origin
from saetrain.saes.base import HookSpace, check_space
from saetrain.stacking import common_width, stacked


@dataclass(frozen=True, kw_only=True)
class LayersConfig(DictionaryConfig):
    """Which layers. Give hooks_in, or a range for hooks named like the run's `hook`."""

    HOOK_FIELDS: ClassVar[tuple[str, ...]] = ("hooks_in",)
    NAMES_INPUTS: ClassVar[bool] = True

    hooks_in: tuple[str, ...] | None = None  # one by one, in order
    start_layer: int | None = None  # first number of the range
    end_layer: int | None = None  # one past the last number
    n_layers: int | None = None  # of the host: the middle half of its layers
    center: Literal["none", "mean"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hook_out is not None:
            raise ConfigError(
                f"sae.hook_out={self.hook_out!r}: this SAE reconstructs the layers it reads. "
                "Remove sae.hook_out"
            )
        names = ("start_layer", "end_layer", "n_layers")
        numbers = [n for n in names if getattr(self, n) is not None]
        if self.hooks_in is not None and numbers:
            raise ConfigError(f"give sae.hooks_in or sae.{numbers[0]}, not both")
        if self.hooks_in is not None:
            check_distinct(self.hooks_in)
        elif numbers:
            self.layer_range()

    def layer_range(self) -> tuple[int, int]:
        """(first, one past the last) layer. ConfigError if the range does not fit the host.

        n_layers alone stands for RouteSAE's choice: entries n // 4 to 3 n // 4 of a host's
        hidden_states, the first of which is the embedding, so resid.(n // 4 - 1) to
        resid.(3 n // 4 - 1).
        """
        n, start, end = self.n_layers, self.start_layer, self.end_layer
        if n is not None and n < 4:
            raise ConfigError(f"sae.n_layers={n}: routing needs a host of at least 4 layers")
        if n is not None:
            start = n // 4 - 1 if start is None else start
            end = 3 * n // 4 if end is None else end
        if start is None or end is None:
            raise ConfigError(
                f"sae.start_layer={start}, sae.end_layer={end}: give both, or sae.n_layers, the "
                "number of the host's layers"
            )
        most = "" if n is None else f", which are 0 to {n - 1} by sae.n_layers={n}"
        if start < 0 or end - start < 2 or (n is not None and end > n):
            raise ConfigError(
                f"sae.start_layer={start}, sae.end_layer={end}: expected a range of at least two "
                f"layers, the end not included{most}"
            )
        return start, end

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(layers, layers). ConfigError if no layers are named."""
        if self.hooks_in is not None:
            return self.hooks_in, self.hooks_in
        if (self.start_layer, self.end_layer, self.n_layers) == (None, None, None):
            raise ConfigError(
                "this SAE reads several layers: give sae.hooks_in=[resid.1,resid.2,…], or "
                "sae.start_layer and sae.end_layer, or sae.n_layers of the host"
            )
        alias = parse_alias(canonical(hook))
        if alias is None:
            raise ConfigError(
                f"hook={hook}: a range of layers needs the kind of hook from a name like resid.2. "
                "Give hook=resid.0, or the layers one by one with sae.hooks_in"
            )
        names = tuple(f"{alias[0]}.{i}" for i in range(*self.layer_range()))
        return names, names


def check_distinct(hooks: tuple[str, ...]) -> None:
    if len(hooks) < 2 or len(set(hooks)) < len(hooks):
        raise ConfigError(
            f"sae.hooks_in={list(hooks)}: expected two or more different hooks, in the order of "
            "the layers"
        )


class Layers(Dictionary):
    """A dictionary whose inputs are rows of several layers, each in its own units."""

    cfg: LayersConfig

    in_center: Tensor  # (L, D)
    in_scale: Tensor  # (L, 1)
    layer_variance: Tensor  # (L,) total variance of each x'_l
    layer_mean: Tensor  # (L, D) mean of each x'_l

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        hooks, _ = cfg.hooks(next(iter(spaces)))
        missing = [h for h in hooks if h not in spaces]
        if missing:
            raise ConfigError(f"sae.hooks_in: no statistics of {', '.join(missing)}")
        check_distinct(hooks)
        for hook in hooks:
            check_space(spaces[hook], cfg)
        common_width(spaces, hooks, "sae.hooks_in")

    def _make_units(self, spaces: Mapping[str, HookSpace]) -> None:
        each = [spaces[hook] for hook in self.hooks_in]
        mean_LD = torch.stack([s.mean.float() for s in each])
        self.in_center = mean_LD * (self.cfg.center == "mean")
        self.in_scale = torch.tensor([[self._scale(s)] for s in each])
        self.register_buffer("layer_mean", self.standardise(mean_LD))
        variance_L = torch.tensor([s.variance for s in each]) * self.in_scale[:, 0] ** 2
        self.register_buffer("layer_variance", variance_L)
        between = (self.layer_mean - self.layer_mean.mean(0)).square().sum(-1).mean()
        self.in_variance = variance_L.mean() + between

    def _scale(self, space: HookSpace) -> float:
        """s_l."""
        if self.cfg.scale == "none":
            return 1.0
        length = space.d**0.5 if self.cfg.scale == "sqrt_d" else 1.0
        centred = self.cfg.center == "mean"
        return float(length / (space.variance**0.5 if centred else space.mean_norm))

    def _make_weights(self, mean_D: Tensor) -> None:
        identity = self.in_center, self.in_scale
        self.in_center, self.in_scale = torch.zeros_like(mean_D), torch.ones(())
        super()._make_weights(self.layer_mean.mean(0))  # b_dec is in the layers' common units
        self.in_center, self.in_scale = identity

    def layers(self, acts: Mapping[str, Tensor]) -> Tensor:
        """x' (..., L, D) of a batch."""
        return self.standardise(stacked(acts, self.hooks_in))

    def inference_parts(self, kind: str, **options: Any) -> tuple[Description, dict[str, Tensor]]:
        """Description and tensors of the saved SAE, as far as all kinds of layers share them."""
        w, form = self.weights(), self.activation.form()
        tensors = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
        tensors |= {"center": self.in_center, "scale": self.in_scale[:, 0]}
        if form.threshold is not None:
            tensors["threshold"] = form.threshold
        description = Description(
            kind=kind,
            activation=form.activation,
            k=form.k,
            d_in=self.d_in,
            n_latents=self.n_latents,
            d_out=self.d_in,
            hooks_in=self.hooks_in,
            hooks_out=self.hooks_out,
            options=options,
            source=origin(self),
        )
        return description, {n: t.detach().clone() for n, t in tensors.items()}


class InferenceLayers(Inference):
    """Saved SAE over rows of several layers: (..., L, D) in, in the order of `hooks_in`."""

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F,)
    W_dec: Tensor  # (F, D)
    b_dec: Tensor  # (D,)
    center: Tensor  # (L, D)
    scale: Tensor  # (L,)

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        d, f, n = description.d_in, description.n_latents, len(description.hooks_in)
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d)}
        shapes |= {"b_dec": (d,), "center": (n, d), "scale": (n,)}
        return shapes | ({"threshold": (f,)} if description.activation == "jumprelu" else {})

    def standardise(self, x: Tensor) -> Tensor:
        """x' of raw activations (..., L, D), in the weights' dtype. ValueError on other shapes."""
        if x.shape[-2:] != self.center.shape:
            want = ", ".join(self.hooks_in)
            raise ValueError(
                f"expected activations (..., {len(self.center)}, {self.d_in}) of {want}, got "
                f"{tuple(x.shape)}"
            )
        return (x.to(self.W_enc.dtype) - self.center) * self.scale[:, None]

    def latents_of(self, x: Tensor) -> Codes:
        """Latents of rows (..., D) in standardised units."""
        return self.form()((x - self.b_dec) @ self.W_enc + self.b_enc)

    def rows_of(self, codes: Codes) -> Tensor:
        """Rows (..., D) in standardised units that latents stand for."""
        return decode_codes(codes, self.W_dec) + self.b_dec

    def single(self, hook: str) -> InferenceSAE:
        """The plain SAE of one layer, its units folded into the weights. ValueError if unknown."""
        if hook not in self.hooks_in:
            raise ValueError(f"{hook!r} is not a layer of this SAE: {', '.join(self.hooks_in)}")
        layer = self.hooks_in.index(hook)
        s, c, form = self.scale[layer], self.center[layer], self.form()
        threshold: Tensor | None = form.threshold
        return InferenceSAE(
            (self.W_enc * s).detach().clone(),
            self.b_enc.detach().clone(),
            (self.W_dec / s).detach().clone(),
            (self.b_dec / s + c).detach().clone(),
            activation=form.activation,
            k=form.k,
            threshold=None if threshold is None else threshold.detach().clone(),
            hooks_in=(hook,),
            hooks_out=(hook,),
            source=self.source,
        )
