"""RouteMatryoshka: the router of route over the nested dictionaries of matryoshka (seed 002; the
only other implementation is github.com/zach-perlman/SAEs). General latents come first, whichever
layer they were read from.

loss = mean over prefixes of ||r - r̂_g||² / ||r||² + penalty(f) + auxk + router_alpha · router loss

The router's error of a layer is that mean, too. See saetrain/saes/route.py and matryoshka.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from saetrain.codes import Codes
from saetrain.dictionary import Weights
from saetrain.saes.base import HookSpace, register
from saetrain.saes.matryoshka import MatryoshkaConfig, nested, random_prefixes
from saetrain.saes.route import Route, RouteConfig


@dataclass(frozen=True, kw_only=True)
class RouteMatryoshkaConfig(RouteConfig, MatryoshkaConfig):
    """The options of both."""


@register("route_matryoshka", RouteMatryoshkaConfig)
class RouteMatryoshka(Route):
    """A router over layers, and nested groups of latents, every prefix of which reconstructs."""

    cfg: RouteMatryoshkaConfig

    def __init__(self, cfg: RouteMatryoshkaConfig, spaces: Mapping[str, HookSpace]) -> None:
        super().__init__(cfg, spaces)
        random = cfg.random_prefixes is not None
        self.group_sizes = (self.n_latents,) if random else cfg.groups(self.n_latents)

    def levels(self, codes: Codes, w: Weights) -> Iterator[Tensor]:
        """The reconstruction from each prefix."""
        n = self.cfg.random_prefixes
        lengths = list(accumulate(self.group_sizes))
        if n is not None:
            lengths = [*random_prefixes(n - 1, self.n_latents), self.n_latents]
        return nested(codes, w, lengths)

    def more_options(self) -> dict[str, object]:
        """The sizes of the groups, where they are fixed."""
        return {} if self.cfg.random_prefixes else {"group_sizes": list(self.group_sizes)}
