"""Independent references for the SAE maths: dense, slow, term by term; and planted data.

Nothing here imports saetrain's formulas. Weights come in as plain tensors in standardised units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.saes.base import SAE, HookSpace


def topk_oracle(h: Tensor, k: int) -> Tensor:
    """(B, F) dense latents by sorting each row in Python and keeping the k best positive ones."""
    out = torch.zeros_like(h)
    for n, row in enumerate(h.tolist()):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        for i in best:
            out[n, i] = h[n, i] if row[i] > 0 else 0.0
    return out


def reference_reconstruction(e: Tensor, kind: str, variance: float) -> Tensor:
    tokens, d = e.shape
    total = sum((e[n] ** 2).sum() for n in range(tokens))
    return total / {"fvu": tokens * variance, "mse": tokens * d, "sse": tokens}[kind]


def topk_reference(
    w: dict[str, Tensor], x: Tensor, k: int, kind: str, variance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(reconstruction loss, residual, pre-activations), all differentiable by dense autograd."""
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    e = x - (topk_oracle(h, k) @ w["W_dec"] + w["b_dec"])
    return reference_reconstruction(e, kind, variance), e, h


def auxk_reference(w: dict[str, Tensor], e: Tensor, h: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """AuxK with the dead latents cut out of the dictionary, then an ordinary top-k among them."""
    ids = dead.nonzero().flatten()
    guess = topk_oracle(h[:, ids], min(k_aux, len(ids))) @ w["W_dec"][ids]
    target = e.detach()
    return ((target - guess) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()


def relu_reference(
    w: dict[str, Tensor], x: Tensor, kind: str, variance: float, weighted: bool
) -> tuple[Tensor, Tensor]:
    """(reconstruction loss, L1 without its coefficient)."""
    f = torch.clamp((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], min=0)
    e = x - (f @ w["W_dec"] + w["b_dec"])
    norms = (w["W_dec"] ** 2).sum(1).sqrt() if weighted else torch.ones(len(w["W_dec"]))
    penalty = sum((f[n] * norms).sum() for n in range(len(x))) / len(x)
    return reference_reconstruction(e, kind, variance), penalty


def planted(
    n: int, d: int, n_features: int, active: int, seed: int = 0, offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x (n, d), features): sums of `active` unit directions times 1 to 2, plus an offset."""
    gen = torch.Generator().manual_seed(seed)
    features = torch.randn(n_features, d, generator=gen)
    features = features / features.norm(dim=1, keepdim=True)
    chosen = torch.rand(n, n_features, generator=gen).argsort(1)[:, :active]
    sizes = 1 + torch.rand(n, active, generator=gen)
    codes = torch.zeros(n, n_features).scatter_(1, chosen, sizes)
    return codes @ features + offset * torch.randn(d, generator=gen), features


def space_of(x: Tensor, name: str = "resid.2") -> HookSpace:
    """The statistics a store would hold of rows x."""
    variance = x.double().var(0, correction=0).sum().item()
    mean_norm = x.double().norm(dim=1).mean().item()
    return HookSpace(
        name=name, d=x.shape[1], mean=x.mean(0), mean_norm=mean_norm, variance=variance
    )


def recovery(sae: SAE, features: Tensor) -> float:
    """Mean over true features of the largest cosine with a decoder row."""
    W_dec = dict(sae.named_parameters())["W_dec"].detach()
    cosines = features @ (W_dec / W_dec.norm(dim=1, keepdim=True)).T
    return cosines.max(1).values.mean().item()
