"""Encode and select: one matrix product, then only the chosen slots exist.

On a CPU the product is made in pieces of tokens whose pre-activations stay in cache (8 MB), and
both selections, the k largest and AuxK's k_aux largest dead ones, read them there. The (B, F)
matrix never exists. Elsewhere one piece is all tokens. Backward: see latents.py.

bf16: the product is made in bfloat16 from float32 weights, and proposes k + max(8, k/2) latents a
token; their pre-activations are then computed in float32, and the k largest of those are the codes.
So values and gradients are exact and only the choice can err: a latent is missed if its rounding
error takes it past the surplus. Bound: whatever is missed lies within 2^-7 Σ_d |x_d W_di| of what
was chosen instead (two roundings of inputs and one of the result, 2^-9 each, on both sides);
tested, together with the share of misses, in tests/test_kernels.py.

Plain twin: `saetrain.codes.topk_codes(x @ W + b, k)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saetrain.kernels.gemm import product
from saetrain.kernels.latents import dot_rows, may_count, sum_by_latent
from saetrain.kernels.topk import exact_topk

CACHED = 1 << 21  # pre-activations of one piece: 8 MB in float32
LEAST = 128  # tokens: below this a matrix product is slower

Slots = tuple[Tensor, Tensor]  # values and indices, (B, K)


def encode_topk(
    x_BD: Tensor,
    W_DF: Tensor,
    b_F: Tensor,
    k: int,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
    bf16: bool = False,
    found: list[Tensor] | None = None,
) -> tuple[Slots, Slots]:
    """((values, indices) of relu(top k), the same of the dead ones), differentiable in W and b.

    `found` is what `slots_of` gave for all tokens, where the caller had their products.
    """

    def select() -> list[Tensor]:
        one = (_Half if bf16 else _Full)(x_BD, W_DF, b_F)
        parts = pieces(len(x_BD), W_DF.shape[1], x_BD.device.type)
        return joined([one(p, k, dead_F, k_aux) for p in parts])

    return encode_with(select if found is None else lambda: found, x_BD, W_DF, b_F)


def slots_of(h_BF: Tensor, k: int, dead_F: Tensor | None, k_aux: int) -> list[Tensor]:
    """Values and indices of the k largest, then of the k_aux largest dead ones. Overwrites h."""
    values, indices = exact_topk(h_BF, k)
    if not k_aux or dead_F is None:
        return [values, indices, values[:, :0], indices[:, :0]]
    return [values, indices, *exact_topk(_living_at(h_BF, dead_F, 0), k_aux)]


def dead_slots(
    h_BF: Tensor, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, dead_F: Tensor, k_aux: int
) -> Slots:
    """Values and indices of the k_aux largest dead ones. Overwrites h = x W + b.

    Where h is not in the type of x it proposes only.
    """
    if h_BF.dtype == x_BD.dtype:
        return exact_topk(_living_at(h_BF, dead_F, 0), k_aux)
    proposed = exact_topk(_living_at(h_BF, dead_F, -torch.inf), surplus(k_aux, len(b_F)))[1]
    return decide(x_BD, W_FD, b_F, proposed, k_aux, dead_F)


def _living_at(h_BF: Tensor, dead_F: Tensor, value: float) -> Tensor:
    """At 0 living latents tie with silent dead ones, which relu makes an empty slot."""
    return h_BF.masked_fill_(~dead_F, value)


def joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What was found in pieces of tokens, for all of them."""
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def encode_with(
    select: Callable[[], list[Tensor]],
    x_BD: Tensor,
    W_DF: Tensor,
    b_F: Tensor,
    *,
    cut: bool = True,
) -> tuple[Slots, Slots]:
    """What `select` finds, relu'd, with gradients to W and b through the slots above 0 alone.

    It gives values and indices (B, K), then those of the auxiliary slots (B, A), where values are
    x W + b at the indices. It runs without autograd and outside autocast. Without `cut` the first
    values stay as they are, with all of their gradients.
    """
    out = _Encode.apply(x_BD, W_DF, b_F, select, cut)  # type: ignore[no-untyped-call]
    return (out[0], out[1]), (out[2], out[3])


def pieces(n_tokens: int, n_latents: int, device: str) -> list[slice]:
    """Runs of tokens whose pre-activations fit into cache."""
    step = n_tokens if device != "cpu" else max(LEAST, CACHED // n_latents)
    return [slice(i, min(i + step, n_tokens)) for i in range(0, n_tokens, max(step, 1))]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_DF: Tensor,
        b_F: Tensor,
        select: Callable[[], list[Tensor]],
        cut: bool,
    ) -> tuple[Tensor, ...]:
        device = x_BD.device.type
        known = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if known else nullcontext():
            out = select()
        values, aux = out[0].relu_() if cut else out[0], out[2].relu_()
        ctx.save_for_backward(x_BD, values, out[1], aux, out[3])
        ctx.W, ctx.n_latents = (W_DF if W_DF.is_leaf else None), W_DF.shape[1]
        ctx.dtypes, ctx.cut = (W_DF.dtype, b_F.dtype), cut
        ctx.mark_non_differentiable(out[1], out[3])
        return values, out[1], aux, out[3]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, *saved = ctx.saved_tensors
        values, indices, aux, aux_indices = saved
        weights = (grads[0] * (values > 0) if ctx.cut else grads[0]).to(x_BD.dtype)
        if aux.shape[1]:
            weights = torch.cat([weights, (grads[2] * (aux > 0)).to(x_BD.dtype)], 1)
            indices = torch.cat([indices, aux_indices], 1)
        W_dtype, b_dtype = ctx.dtypes
        grad_b = x_BD.new_zeros(ctx.n_latents)
        grad_b.scatter_add_(0, indices.reshape(-1), weights.reshape(-1))
        if many(weights, ctx.n_latents):  # of the auxiliary slots: a product is cheaper
            wide = x_BD.new_zeros(len(x_BD), ctx.n_latents).scatter_add_(1, indices, weights)
            grad_W = wide.T @ x_BD
        else:
            grad_W = sum_by_latent(x_BD, weights, indices, ctx.n_latents, ctx.W)
        return None, grad_W.T.to(W_dtype), grad_b.to(b_dtype), None, None


def many(weights_BK: Tensor, n_latents: int) -> bool:
    """Whether a matrix product beats gathering rows: from one latent in 16 on (measured).

    Slots of weight 0 do not count, where they may be counted.
    """
    n, k = weights_BK.shape
    used = int(weights_BK.count_nonzero()) if may_count(weights_BK) else n * k
    return 16 * used >= n * n_latents


class _Full:
    """Selection of a piece of tokens by the product in the type of x."""

    def __init__(self, x_BD: Tensor, W_DF: Tensor, b_F: Tensor) -> None:
        self.x, self.W, self.b = x_BD, W_DF.to(x_BD.dtype), b_F.to(x_BD.dtype)

    def __call__(self, piece: slice, k: int, dead_F: Tensor | None, k_aux: int) -> list[Tensor]:
        return slots_of(product(self.x[piece], self.W, self.b), k, dead_F, k_aux)


class _Half(_Full):
    """Proposed by a bfloat16 product, decided in the type of x."""

    def __init__(self, x_BD: Tensor, W_DF: Tensor, b_F: Tensor) -> None:
        super().__init__(x_BD, W_DF, b_F)
        self.W_FD, self.dtype = self.W.T, torch.bfloat16
        self.half = x_BD.to(self.dtype), W_DF.to(self.dtype), b_F.to(self.dtype)

    def __call__(self, piece: slice, k: int, dead_F: Tensor | None, k_aux: int) -> list[Tensor]:
        x, W, b = self.half
        h = product(x[piece], W, b)
        proposed = exact_topk(h, surplus(k, len(self.b)))[1]
        values, indices = decide(self.x[piece], self.W_FD, self.b, proposed, k)
        if not k_aux or dead_F is None:
            return [values, indices, values[:, :0], indices[:, :0]]
        aux = dead_slots(h, self.x[piece], self.W_FD, self.b, dead_F, k_aux)
        return [values, indices, *aux]


def surplus(k: int, n_latents: int) -> int:
    """How many latents a bfloat16 product proposes where k are wanted."""
    return min(k + max(8, k // 2), n_latents)


def decide(
    x_BD: Tensor,
    W_FD: Tensor,
    b_F: Tensor,
    proposed: Tensor,
    k: int,
    dead_F: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of the proposed latents by exact pre-activations; living ones count as 0."""
    h = dot_rows(x_BD, W_FD, proposed).add_(b_F[proposed])
    if dead_F is not None:
        h.masked_fill_(~dead_F[proposed], 0)
    values, place = h.topk(k, dim=-1, sorted=False)
    return values, proposed.gather(1, place)
