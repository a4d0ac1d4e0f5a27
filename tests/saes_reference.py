"""Independent references for the SAE maths: dense, slow, term by term; and planted data.

Nothing here imports saetrain's formulas. Weights come in as plain tensors in standardised units.
Each architecture has a reference `(w, x, dead) -> {term: value}`, differentiable by dense autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saetrain.saes.base import SAE, HookSpace

Terms = dict[str, Tensor]

# -- activations -----------------------------------------------------------------------------------


def topk_oracle(h: Tensor, k: int) -> Tensor:
    """(B, F) dense latents by sorting each row in Python and keeping the k best positive ones."""
    out = torch.zeros_like(h)
    for n, row in enumerate(h.tolist()):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        for i in best:
            out[n, i] = h[n, i] if row[i] > 0 else 0.0
    return out


def batchtopk_oracle(h: Tensor, k: float) -> Tensor:
    """The k·B best positive ones of all rows together."""
    tokens, width = h.shape
    flat = h.reshape(-1)
    values = flat.tolist()
    out = torch.zeros_like(flat)
    for i in sorted(range(len(values)), key=lambda i: -values[i])[: round(k * tokens)]:
        out[i] = flat[i] if values[i] > 0 else 0.0
    return out.reshape(tokens, width)


def groupmax_oracle(h: Tensor, k: int) -> Tensor:
    """The best positive one of each of k runs of latents."""
    size, out = h.shape[1] // k, torch.zeros_like(h)
    for n, row in enumerate(h.tolist()):
        for start in range(0, len(row), size):
            i = max(range(start, start + size), key=lambda j: row[j])
            out[n, i] = h[n, i] if row[i] > 0 else 0.0
    return out


def jumprelu_oracle(h: Tensor, theta: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(latents, steps) whose gradients in θ are those of a ramp of width ε around it."""
    ramp = ((h.detach() - theta) / epsilon + 0.5).clamp(0, 1)
    ramp = ramp - ramp.detach()  # value 0, slope -1/ε inside
    fires = (h > theta).detach().to(h)
    return h * fires + theta.detach() * ramp, fires + ramp


# -- loss terms ------------------------------------------------------------------------------------


def reference_reconstruction(e: Tensor, kind: str, variance: float) -> Tensor:
    tokens, d = e.shape
    total = sum((e[n] ** 2).sum() for n in range(tokens))
    return total / {"fvu": tokens * variance, "mse": tokens * d, "sse": tokens}[kind]


def auxk_reference(w: dict[str, Tensor], e: Tensor, h: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """AuxK with the dead latents cut out of the dictionary, then an ordinary top-k among them."""
    ids = dead.nonzero().flatten()
    guess = topk_oracle(h[:, ids], min(k_aux, len(ids))) @ w["W_dec"][ids]
    target = e.detach()
    return ((target - guess) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()


def l1_reference(f: Tensor, norms: Tensor | float = 1.0) -> Tensor:
    return sum((f[n].abs() * norms).sum() for n in range(len(f))) / len(f)


def pre_activations(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def sae_reference(
    select: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    penalty: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Terms] = lambda f, h, w: {},
    aux_k: int = 0,
) -> Callable[..., Terms]:
    """Terms of a plain SAE from its selection and penalty; AuxK of weight 1/32 with `aux_k`."""

    def terms(w: dict[str, Tensor], x: Tensor, dead: Tensor, kind: str, variance: float) -> Terms:
        h = pre_activations(w, x)
        f = select(h, w)
        e = x - (f @ w["W_dec"] + w["b_dec"])
        out = {"reconstruction": reference_reconstruction(e, kind, variance), **penalty(f, h, w)}
        if aux_k:
            out["auxk"] = auxk_reference(w, e, h, dead, aux_k) / 32
        return out

    return terms


def weighted_relu_reference(
    w: dict[str, Tensor], x: Tensor, dead: Tensor, kind: str, variance: float
) -> Terms:
    """ReLU with a free decoder: λ = 0.05 times Σ f ||w||, with plain f and w."""
    norms = (w["W_dec"] ** 2).sum(1).sqrt()
    plain = sae_reference(
        lambda h, w: h.clamp(min=0), lambda f, h, w: {"l1": 0.05 * l1_reference(f, norms)}
    )
    return plain(w, x, dead, kind, variance)


def gated_reference(
    w: dict[str, Tensor], x: Tensor, dead: Tensor, kind: str, variance: float
) -> Terms:
    """arXiv 2404.16014, eq. 4-8, one token at a time; λ = 0.05."""
    x_hat, x_gate, open_ = [], [], []
    for row in x:
        pi = (row - w["b_dec"]) @ w["W_enc"]
        gate = (pi + w["b_gate"]).clamp(min=0)
        f = ((pi + w["b_gate"]) > 0) * (w["r_mag"].exp() * pi + w["b_mag"]).clamp(min=0)
        x_hat.append(f @ w["W_dec"] + w["b_dec"])
        x_gate.append(gate @ w["W_dec"].detach() + w["b_dec"].detach())
        open_.append(gate)
    return {
        "reconstruction": reference_reconstruction(x - torch.stack(x_hat), kind, variance),
        "l1": 0.05 * l1_reference(torch.stack(open_)),
        "gate": reference_reconstruction(x - torch.stack(x_gate), kind, variance),
    }


def matryoshka_reference(sizes: list[int], k: float, aux_k: int) -> Callable[..., Terms]:
    """Every prefix decoded from scratch; free rows, so latents count f ||w||."""

    def terms(w: dict[str, Tensor], x: Tensor, dead: Tensor, kind: str, variance: float) -> Terms:
        n = (w["W_dec"] ** 2).sum(1).sqrt()
        w = w | {"W_dec": w["W_dec"] / n[:, None], "W_enc": w["W_enc"] * n, "b_enc": w["b_enc"] * n}
        h = pre_activations(w, x)
        f, levels = batchtopk_oracle(h, k), []
        for g in range(1, len(sizes) + 1):
            m = sum(sizes[:g])
            e = x - (f[:, :m] @ w["W_dec"][:m] + w["b_dec"])
            levels.append(reference_reconstruction(e, kind, variance))
        aux = auxk_reference(w, e, h, dead, aux_k) / 32
        return {"reconstruction": sum(levels) / len(levels), "auxk": aux}

    return terms


# -- data ------------------------------------------------------------------------------------------


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
    W_dec: Any = dict(sae.named_parameters())["W_dec"].detach()
    cosines = features @ (W_dec / W_dec.norm(dim=1, keepdim=True)).T
    return cosines.max(1).values.mean().item()
