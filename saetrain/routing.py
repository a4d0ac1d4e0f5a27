"""Routers: which layer of a token an SAE reads, and how that choice is learned.

p = softmax(agg_l(x'_l) W_router + b_router),  agg the sum or the mean over the L layers
hard: r = x'_j, j = argmax p (or p_j x'_j with scale_by_weight, as RouteSAE has it)
soft: r = Σ_l p_l x'_l

How a hard router learns. The gradient that RouteSAE has is that of p_j in r = p_j x'_j, and it is
zero where it matters: TopK without biases is positively homogeneous and NMSE divides by ||r||², so
p_j cancels. A straight-through gate does not help: its gradient in p_l is <∂loss/∂r, x'_l>, which
is 0 for l = j by the same argument (Euler), and says nothing of how well layer l itself would be
reconstructed. What one wants to descend is the expected loss of routing at random with p, whose
gradient is known exactly once the error ε_l of every layer is:

router loss = mean over tokens of Σ_l p_l ε_l,  ε_l = ||x'_l - x̂'(x'_l)||² / ||x'_l||², held fixed

The first B / L tokens of a (mixed) batch are tried with all their layers, so this costs one more
encoding and decoding of B rows and no backward pass; it is unbiased for the expected loss, and not
for the argmax, which it approaches as p sharpens. Errors only: that a layer needs more latents
under a penalty counts for nothing. b_router, which RouteSAE lacks, starts at 0; without it a router
of centred inputs could not prefer a layer whatever the token.

Shapes: B tokens, M tokens tried, L layers, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sum", "mean"]
Routing = Literal["hard", "soft"]


def probabilities(x: Tensor, W_router_DL: Tensor, b_router_L: Tensor, aggre: Aggregation) -> Tensor:
    """p (..., L) of standardised layers x (..., L, D); sums to 1."""
    total = x.sum(-2) if aggre == "sum" else x.mean(-2)
    return (total @ W_router_DL + b_router_L).softmax(-1)


def gates(p: Tensor, routing: Routing, scale_by_weight: bool) -> Tensor:
    """What each layer is multiplied by, (..., L)."""
    if routing == "soft":
        return p
    best = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
    return best * p if scale_by_weight else best


def routed(x: Tensor, gate: Tensor) -> Tensor:
    """r (..., D): the layers x (..., L, D), weighted by gate (..., L) and added up."""
    return (x * gate[..., None]).sum(-2)


def expected(p_ML: Tensor, errors_ML: Tensor) -> Tensor:
    """The expected error of routing at random with p; errors get no gradient."""
    return (p_ML * errors_ML.detach()).sum(-1).mean()
