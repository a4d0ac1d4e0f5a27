"""Independent references for SAEs over several layers and for mixtures of transforms, written token
by token from the formulas, and planted data. Nothing here imports saetrain's formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from saes_reference import (
    Terms,
    auxk_reference,
    planted,
    pre_activations,
    reference_reconstruction,
)
from torch import Tensor

from saetrain.saes.base import SAE

Select = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

# -- routing ---------------------------------------------------------------------------------------


def router_reference(w: Mapping[str, Tensor], x: Tensor, aggre: str = "sum") -> Tensor:
    """Probabilities (B, L) of standardised layers x (B, L, D), one token and layer at a time."""
    tokens = []
    for layers in x:
        total = sum(layers) / (len(layers) if aggre == "mean" else 1)
        scores = [total @ w["W_router"][:, i] + w["b_router"][i] for i in range(len(layers))]
        sizes = [score.exp() for score in scores]
        tokens.append(torch.stack([size / sum(sizes) for size in sizes]))
    return torch.stack(tokens)


def gather_oracle(x: Tensor, p: Tensor, scaled: bool = False) -> Tensor:
    """Hard routing: the layer of the largest probability, picked by number."""
    best = [max(range(len(row)), key=lambda i, row=row: row[i]) for row in p.tolist()]
    return torch.stack([x[n, i] * (p[n, i] if scaled else 1) for n, i in enumerate(best)])


def weighted_sum_oracle(x: Tensor, p: Tensor) -> Tensor:
    """Soft routing."""
    return torch.stack([sum(p[n, i] * x[n, i] for i in range(x.shape[1])) for n in range(len(x))])


def relative_errors(r: Tensor, guess: Tensor) -> Tensor:
    return torch.stack([((a - b) ** 2).sum() / (a**2).sum() for a, b in zip(r, guess, strict=True)])


def route_reference(
    select: Select,
    aux_k: int = 0,
    *,
    routing: str = "hard",
    scaled: bool = False,
    aggre: str = "sum",
    alpha: float = 1.0,
    sizes: Sequence[int] = (),
) -> Callable[..., Terms]:
    """Terms of a routed SAE; `sizes` of nested groups make it a matryoshka."""

    def guesses(w: Mapping[str, Tensor], r: Tensor) -> list[Tensor]:
        f = select(pre_activations(w, r), w)
        ends = [sum(sizes[: g + 1]) for g in range(len(sizes))] or [f.shape[1]]
        return [f[:, :m] @ w["W_dec"][:m] + w["b_dec"] for m in ends]

    def terms(w: dict[str, Tensor], x: Tensor, dead: Tensor, kind: str, variance: float) -> Terms:
        p = router_reference(w, x, aggre)
        r = gather_oracle(x, p, scaled) if routing == "hard" else weighted_sum_oracle(x, p)
        found, levels = guesses(w, r), []
        for guess in found:
            if kind == "nmse":
                levels.append(relative_errors(r, guess).sum() / len(r))
            else:
                levels.append(reference_reconstruction(r - guess, kind, variance))
        out = {"reconstruction": sum(levels) / len(levels)}
        if aux_k:
            h = pre_activations(w, r)
            out["auxk"] = auxk_reference(w, r - found[-1], h, dead, aux_k) / 32
        if alpha:
            tried = len(x) // x.shape[1]
            every = torch.cat([x[n] for n in range(tried)])
            errors = sum(relative_errors(every, g) for g in guesses(w, every)) / len(levels)
            expected = [
                p[n, i] * errors[n * x.shape[1] + i].detach()
                for n in range(tried)
                for i in range(x.shape[1])
            ]
            out["router"] = alpha * sum(expected) / tried
        return out

    return terms


# -- MLSAE -----------------------------------------------------------------------------------------


def mlsae_reference(select: Select, aux_k: int) -> Callable[..., Terms]:
    """A plain SAE on the rows of all layers, put below each other token by token."""

    def terms(w: dict[str, Tensor], x: Tensor, dead: Tensor, kind: str, variance: float) -> Terms:
        rows = torch.stack([layer for token in x for layer in token])
        h = pre_activations(w, rows)
        e = rows - (select(h, w) @ w["W_dec"] + w["b_dec"])
        aux = auxk_reference(w, e, h, dead, aux_k) / 32
        return {"reconstruction": reference_reconstruction(e, kind, variance), "auxk": aux}

    return terms


# -- MoLT ------------------------------------------------------------------------------------------


def molt_matrices(w: Mapping[str, Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Every transform as a whole (D, E) matrix."""
    return [V @ U for r in ranks for V, U in zip(w[f"V_{r}"], w[f"U_{r}"], strict=True)]


def molt_reference(ranks: Sequence[int]) -> Callable[..., Terms]:
    """ReLU latents and 0.02 Σ f, with f in units of transforms of Frobenius norm 1."""

    def terms(
        w: dict[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, kind: str, variance: float
    ) -> Terms:
        maps = molt_matrices(w, ranks)
        norms = torch.stack([(T**2).sum().sqrt() for T in maps])
        guesses, f = [], ((x @ w["W_enc"] + w["b_enc"]) * norms).clamp(min=0)
        for n in range(len(x)):
            parts = [f[n, i] / norms[i] * (x[n] @ T) for i, T in enumerate(maps)]
            guesses.append(sum(parts) + w["b_dec"])
        e = y - torch.stack(guesses)
        error = reference_reconstruction(e, kind, variance)
        return {"reconstruction": error, "l1": 0.02 * f.sum() / len(f)}

    return terms


def maps_found(sae: SAE, maps: Sequence[Tensor]) -> float:
    """Mean over planted maps of the largest cosine with a learned one.

    Rows of a map that no token with that map reads (other maps' gates) are left out.
    """
    w, best = {n: p.detach() for n, p in sae.named_parameters()}, []
    for i, M in enumerate(maps):
        seen = [i, *range(len(maps), len(M))]
        each = [
            torch.cosine_similarity(M[seen].flatten(), T[seen].flatten(), dim=0)
            for T in molt_matrices(w, list(sae.ranks))
        ]
        best.append(torch.stack(each).max())
    return torch.stack(best).mean().item()


# -- data ------------------------------------------------------------------------------------------


def layers_of_one_kind(n: int, d: int, sparse: int, n_layers: int) -> dict[str, Tensor]:
    """Hooks resid.1, …; the one numbered `sparse` is exactly 2-sparse, the others are noise."""
    gen = torch.Generator().manual_seed(11)
    acts = {}
    for i in range(1, n_layers + 1):
        size = 3.0**i  # as in a residual stream
        offset = torch.randn(d, generator=gen)
        acts[f"resid.{i}"] = size * (torch.randn(n, d, generator=gen) + offset)
    acts[f"resid.{sparse}"] = 3.0**sparse * planted(n, d, 24, 2, seed=7)[0]
    return acts


def shared_layers(x: Tensor) -> dict[str, Tensor]:
    """The same features at other tokens, seven times as long and elsewhere."""
    return {"resid.1": x, "resid.2": 7 * x.roll(1, 0) + 3}


def planted_mixture(n: int, d: int, e: int, count: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(hooks mlp_in.0 and mlp.0, maps): y = Σ_i a_i M_i x, one gate direction of x for each map."""
    gen = torch.Generator().manual_seed(5)
    maps = [
        torch.randn(d, 2, generator=gen) @ torch.randn(2, e, generator=gen) for _ in range(count)
    ]
    chosen = torch.randint(0, count, (n,), generator=gen)
    size = 1 + torch.rand(n, generator=gen)
    x = 0.5 * torch.randn(n, d, generator=gen)
    x[:, :count] = 0
    x[torch.arange(n), chosen] = size
    y = torch.stack([a * (row @ maps[int(i)]) for row, i, a in zip(x, chosen, size, strict=True)])
    return {"resid.0": x, "mlp.1": y}, maps
