"""References for SAEs between several hooks: token by token, hook by hook, from the formulas.

Nothing here imports saetrain's formulas. `w` are parameters in standardised units, `x` (B, H, D)
and `y` (B, G, E) standardised activations, `variances` those of the hooks of y. Decoders are free
in all cases here; their lengths are divided out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from saes_reference import Terms, topk_oracle
from torch import Tensor

Select = Callable[[Tensor, Mapping[str, Tensor], int], Tensor]  # (h, w, layer)


def hookwise_reconstruction(e: Tensor, kind: str, variances: list[float]) -> Tensor:
    """fvu: mean over hooks of each hook's own; mse, sse: over all of them. e (B, G, E)."""
    tokens, hooks, width = e.shape
    each = [sum((e[n, g] ** 2).sum() for n in range(tokens)) / tokens for g in range(hooks)]
    if kind == "fvu":
        return sum(sse / v for sse, v in zip(each, variances, strict=True)) / hooks
    return sum(each) / (hooks * width if kind == "mse" else 1)


def auxk_multi(e: Tensor, guess: Tensor) -> Tensor:
    """Σ||e - ê||² / Σ||e - mean e||² over all hooks, e detached."""
    target = e.detach().flatten(1)
    return ((target - guess.flatten(1)) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()


def transcoder_reference(
    w: Mapping[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, kind: str, variances: list[float]
) -> Terms:
    """TopK of h||w||, k = 2, AuxK of 3 dead ones; with W_skip if there is one."""
    norms = w["W_dec"].norm(dim=1)
    h = torch.stack([(one @ w["W_enc"] + w["b_enc"]) * norms for one in x[:, 0]])
    rows = w["W_dec"] / norms[:, None]
    e = y[:, 0] - (topk_oracle(h, 2) @ rows + w["b_dec"])
    if "W_skip" in w:
        e = e - torch.stack([w["W_skip"] @ one for one in x[:, 0]])
    ids = dead.nonzero().flatten()
    aux = topk_oracle(h[:, ids], 3) @ rows[ids]
    return {
        "reconstruction": hookwise_reconstruction(e[:, None], kind, variances),
        "auxk": auxk_multi(e, aux) / 32,
    }


def crosscoder_reference(
    w: Mapping[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, kind: str, variances: list[float]
) -> Terms:
    """ReLU, λ Σ_i f_i Σ_g ||W_g,i|| with λ = 0.05, as printed: nothing is divided."""
    hooks, width = x.shape[1], x.shape[2]
    W_enc = w["W_enc"].reshape(hooks, width, -1)
    W_dec = w["W_dec"].reshape(len(w["b_enc"]), hooks, width)
    b_dec = w["b_dec"].reshape(hooks, width)
    errors, costs = [], []
    for token, target in zip(x, y, strict=True):
        f = (sum(token[h] @ W_enc[h] for h in range(hooks)) + w["b_enc"]).clamp(min=0)
        errors.append(torch.stack([target[g] - f @ W_dec[:, g] - b_dec[g] for g in range(hooks)]))
        costs.append(sum((f * W_dec[:, g].norm(dim=1)).sum() for g in range(hooks)))
    return {
        "reconstruction": hookwise_reconstruction(torch.stack(errors), kind, variances),
        "l1": 0.05 * sum(costs) / len(costs),
    }


def clt_reference(
    select: Select, penalty: Callable[[Tensor], Terms], aux_k: int = 0
) -> Callable[..., Terms]:
    """Every pair of a source and a target layer by itself."""

    def terms(
        w: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        dead: Tensor,
        kind: str,
        variances: list[float],
    ) -> Terms:
        layers, width = y.shape[1], y.shape[2]
        f, writes, aux = [], {}, []
        for i in range(layers):
            W = w[f"W_dec.{i}"].reshape(-1, layers - i, width)
            size = (W**2).sum((1, 2)).sqrt()
            h = (x[:, i] @ w["W_enc"][i] + w["b_enc"][i]) * size
            f.append(select(h, w, i))
            writes |= {(i, t): W[:, t - i] / size[:, None] for t in range(i, layers)}
            ids = dead.reshape(layers, -1)[i].nonzero().flatten()
            kept = torch.zeros_like(h)
            kept[:, ids] = topk_oracle(h[:, ids], aux_k) if aux_k else 0.0
            aux.append(kept)
        b_dec = w["b_dec"].reshape(layers, width)

        def written(codes: list[Tensor], t: int) -> Tensor:
            return sum(codes[i] @ writes[i, t] for i in range(t + 1))

        e = torch.stack([y[:, t] - written(f, t) - b_dec[t] for t in range(layers)], dim=1)
        out = {"reconstruction": hookwise_reconstruction(e, kind, variances)}
        out |= penalty(torch.cat(f, dim=1))
        if aux_k:
            guess = torch.stack([written(aux, t) for t in range(layers)], dim=1)
            out["auxk"] = auxk_multi(e, guess) / 32
        return out

    return terms
