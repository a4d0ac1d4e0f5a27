"""Rows of tests/test_saes.py for SAEs over several layers and mixtures of transforms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from saes_reference import Terms, batchtopk_oracle, topk_oracle
from saes_reference_route import (
    layers_of_one_kind,
    mlsae_reference,
    molt_reference,
    planted_mixture,
    route_reference,
    shared_layers,
)
from saes_rows import Row, X, above, exactly, on_average
from torch import Tensor

from saetrain.saes.base import SAE

MIXED = layers_of_one_kind(4096, 16, sparse=2, n_layers=3)
SHARED = shared_layers(X)
PAIR, MAPS = planted_mixture(4096, 16, 12, 4)


def standardised(x: Tensor, rows: slice) -> tuple[Tensor, float]:
    """Rows of a layer, mean off and of mean square D, and the variance that all of them have.

    In float64, but with the mean and the scale as SAEs keep them, in float32.
    """
    x, d = x.double() - x.mean(0), x.shape[1]
    scale = (d / x.square().sum(1).mean()).sqrt().float()
    return (x * scale)[rows], d * float(scale) ** 2 / float(d / x.square().sum(1).mean())


@dataclass(frozen=True, kw_only=True)
class LayersRow(Row):
    """A row whose reference reads standardised layers (B, L, D)."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.lead, 16)

    def terms(self, sae: SAE, w: dict[str, Tensor], rows: slice, kind: str) -> Terms:
        """Standardised here from the data itself."""
        each = [standardised(x, rows) for x in self.acts.values()]
        x = torch.stack([layer for layer, _ in each], dim=1)
        return self.reference(w, x, sae.dead, kind, each[0][1])


@dataclass(frozen=True, kw_only=True)
class MoltRow(Row):
    """A row whose reference reads inputs and outputs, of mean length √d, the mean left on."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (12,)

    def terms(self, sae: SAE, w: dict[str, Tensor], rows: slice, kind: str) -> Terms:
        x, y = (self.acts[hook].double() for hook in PAIR)
        x, y = (z * (z.shape[1] ** 0.5 / z.norm(dim=1).mean()).float() for z in (x, y))
        variance = float(y.var(0, correction=0).sum())
        return self.reference(w, x[rows], y[rows], sae.dead, kind, variance)


def top2(h: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return topk_oracle(h, 2)


ROUTE = LayersRow(
    name="route",
    values={"k": 2, "aux_k": 3, "hooks_in": tuple(MIXED)},
    trained=exactly(2),
    inferred=exactly(2),
    reference=route_reference(top2, aux_k=3),
    acts=MIXED,
    half_error=0.15,  # in noise, 2 of 100 tokens choose other latents, see test_saes_route.py
    half_gradient=0.2,
)
SOFT = replace(
    ROUTE,
    more="route_soft",
    values=ROUTE.values | {"routing": "soft", "aggre": "mean", "reconstruction": "nmse"},
    reference=route_reference(top2, aux_k=3, routing="soft", aggre="mean", alpha=0),
)
ROUTE_MATRYOSHKA = LayersRow(
    name="route_matryoshka",
    values={"k": 2, "aux_k": 3, "group_sizes": (24, 16, 8), "hooks_in": tuple(MIXED)},
    trained=on_average(2),
    inferred=above(0),
    reference=route_reference(lambda h, w: batchtopk_oracle(h, 2), aux_k=3, sizes=(24, 16, 8)),
    acts=MIXED,
    half_error=0.15,
    half_gradient=0.2,
)
MLSAE = LayersRow(
    name="mlsae",
    values={"k": 2, "aux_k": 3, "hooks_in": tuple(SHARED)},
    trained=exactly(2),
    inferred=exactly(2),
    reference=mlsae_reference(top2, aux_k=3),
    acts=SHARED,
    rows_per_token=2,
    half_error=0.05,
)
MOLT = MoltRow(
    name="molt",
    values={
        "n_latents": 12,
        "ranks": {2: 8, 1: 4},
        "hook_out": "mlp.1",
        "penalty": {"name": "l1", "coefficient": 0.02},
    },
    trained=above(0),
    inferred=above(0),
    reference=molt_reference(ranks=(2, 1)),
    acts=PAIR,
    passes_by=True,
)
ROUTED = [ROUTE, SOFT, ROUTE_MATRYOSHKA, MLSAE, MOLT]
