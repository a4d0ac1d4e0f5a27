"""Attention by loops over contexts, rows, patterns and sources; and planted attention.

Nothing here imports saetrain. Rotary positions are products of complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from saes_reference import Terms, auxk_reference, reference_reconstruction
from torch import Tensor


def turned(q: Tensor, t: int, base: float | None) -> Tensor:
    """q (Q,) as Q/2 complex numbers, turned by its position."""
    half = len(q) // 2
    z = torch.complex(q[:half], q[half:])
    if base is None:
        return z
    rates = torch.tensor([base ** (-i / half) for i in range(half)]).to(q)
    return z * torch.polar(torch.ones_like(rates), t * rates)


def reference_heads(
    w: Mapping[str, Tensor], x: Tensor, there: Tensor | None, base: float | None, shared: int
) -> Tensor:
    """(S, T, F) what each head brings to each row, b_V included; `shared` heads per pattern."""
    contexts = []
    for c in range(len(x)):
        rows = []
        for t in range(x.shape[1]):
            sources = [s for s in range(t + 1) if s == t or there is None or bool(there[c, s])]
            heads = []
            for g in range(len(w["W_Q"])):
                q = turned(x[c, t] @ w["W_Q"][g] + w["b_Q"][g], t, base)
                scores = []
                for s in sources:
                    k = turned(x[c, s] @ w["W_K"][g] + w["b_K"][g], s, base)
                    scores.append((q * k.conj()).real.sum() / w["W_Q"].shape[-1] ** 0.5)
                weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
                own = slice(g * shared, (g + 1) * shared)
                pairs = zip(weights, sources, strict=True)
                moved = sum(a * (x[c, s] @ w["W_V"][:, own]) for a, s in pairs)
                heads.append(moved + w["b_V"][own])
            rows.append(torch.cat(heads))
        contexts.append(torch.stack(rows))
    return torch.stack(contexts)


def reference_terms(
    w: Mapping[str, Tensor],
    h: Tensor,
    y: Tensor,
    select: Callable[..., Tensor],
    penalty: Callable[..., Terms],
    dead: Tensor,
    aux_k: int,
    kind: str,
    variance: float,
) -> Terms:
    """Loss terms of heads h (N, F) and standardised outputs y (N, E); AuxK of weight 1/32."""
    f = select(h, w)
    e = y - (f @ w["W_dec"] + w["b_dec"])
    out = {"reconstruction": reference_reconstruction(e, kind, variance), **penalty(f, h, w)}
    out["auxk"] = auxk_reference(dict(w), e, h, dead, aux_k) / 32
    return out


@dataclass(frozen=True)
class Plant:
    """Contexts (S, T, D), outputs, which rows count, the marked row, 6 output directions."""

    x: Tensor
    y: Tensor
    counts: Tensor
    marked: Tensor
    directions: Tensor


def planted_attention(n: int = 512, t: int = 8, d: int = 16, words: int = 9) -> Plant:
    """Words are orthogonal directions. If the word before is one of the first three, a direction of
    its own is written; so it is, another, if that of the marked row is. One of the first three
    rows of a context is marked; rows from the fourth on count."""
    gen = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(d, d, generator=gen))[0]
    directions = torch.linalg.qr(torch.randn(d, d, generator=gen))[0][:6]
    silent = torch.zeros(words - 3, d)
    before, marked = (torch.cat([part, silent]) for part in directions.split(3))
    word = torch.randint(0, words, (n, t), generator=gen)
    place = torch.randint(0, 3, (n,), generator=gen)
    x = basis[word] + 0.02 * torch.randn(n, t, d, generator=gen)
    x[torch.arange(n), place] += basis[words]
    y = torch.zeros(n, t, d)
    y[:, 1:] += before[word[:, :-1]]
    y += marked[word[torch.arange(n), place]][:, None]
    counts = (torch.arange(t) >= 3).expand(n, t)
    return Plant(2 * x, 3 * y + 1, counts, place, directions)
