"""What runs on the GPU: sums and dot products of gathered rows, in Triton. Imported on first use.

A program has R slots at a time in its hands, C channels of each: the loads of R rows are under way
together, and all that is summed is summed in float32 and in a fixed order, so that results repeat.
Nothing is read for slots of weight 0. Launched by triton_decode.py and triton_latents.py.

Arguments are pointers to contiguous tensors, then sizes. The compiler evaluates annotations and
knows no names but Triton's, so they are all `tl.tensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

jit: Callable[[Callable[..., object]], Any] = triton.jit


@jit
def add_rows(
    total: tl.tensor,
    rows: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    channel: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """total (R, C) + weights (R,) times the rows `ids` (R,) of `rows` (n, width)."""
    wanted = (weights != 0)[:, None] & (channel < width)[None, :]  # NaN is wanted
    at = ids.to(tl.int64)[:, None] * width + channel[None, :]
    row = tl.load(rows + at, mask=wanted, other=0.0).to(tl.float32)
    return total + weights[:, None] * row


@jit
def decode(
    values: tl.tensor,
    indices: tl.tensor,
    W: tl.tensor,
    out: tl.tensor,
    n_slots: tl.tensor,
    width: tl.tensor,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Program (token, block of channels): out (B, E) = Σ_k values · W[indices]."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    for first in range(0, n_slots, R):
        slot = first + tl.arange(0, R)
        weight = tl.load(values + token * n_slots + slot, mask=slot < n_slots, other=0.0)
        latent = tl.load(indices + token * n_slots + slot, mask=slot < n_slots, other=0)
        total = add_rows(total, W, latent, weight.to(tl.float32), channel, width)
    summed = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + token * width + channel, summed, mask=channel < width)


@jit
def dot_rows(
    x: tl.tensor,
    W: tl.tensor,
    indices: tl.tensor,
    out: tl.tensor,
    n_slots: tl.tensor,
    width: tl.tensor,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Program (token, R slots): out (B, K) = x[token] · W[indices]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * R + tl.arange(0, R)
    latent = tl.load(indices + token * n_slots + slot, mask=slot < n_slots, other=0)
    start = latent.to(tl.int64)[:, None] * width
    total = tl.zeros((R, C), dtype=tl.float32)
    for first in range(0, width, C):
        channel = first + tl.arange(0, C)
        inside = channel < width
        mine = tl.load(x + token * width + channel, mask=inside, other=0.0).to(tl.float32)
        both = (slot < n_slots)[:, None] & inside[None, :]
        row = tl.load(W + start + channel[None, :], mask=both, other=0.0).to(tl.float32)
        total += row * mine[None, :]
    summed = tl.sum(total, axis=1).to(out.dtype.element_ty)
    tl.store(out + token * n_slots + slot, summed, mask=slot < n_slots)


@jit
def sum_windows(
    x: tl.tensor,
    weights: tl.tensor,
    tokens: tl.tensor,
    by_latent: tl.tensor,
    partial: tl.tensor,
    n_latents: tl.tensor,
    width: tl.tensor,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Program (window, block of channels): the sum of S neighbouring slots of one latent.

    Windows that several latents share are left to `sum_latents`.
    """
    window = tl.program_id(0)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    latent = tl.load(by_latent + window * S)
    same = latent == tl.load(by_latent + window * S + S - 1)
    if same & (latent < n_latents):
        total = tl.zeros((R, C), dtype=tl.float32)
        for first in range(0, S, R):
            slot = window * S + first + tl.arange(0, R)
            weight = tl.load(weights + slot).to(tl.float32)
            total = add_rows(total, x, tl.load(tokens + slot), weight, channel, width)
        at = window.to(tl.int64) * width + channel
        tl.store(partial + at, tl.sum(total, axis=0), mask=channel < width)


@jit
def sum_latents(
    x: tl.tensor,
    weights: tl.tensor,
    tokens: tl.tensor,
    starts: tl.tensor,
    partial: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    S: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Program (latent, block of channels): its slots outside whole windows, then its windows."""
    latent = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    first_window, past_window = (begin + S - 1) // S, end // S
    # Loose are those before the first window and after the last; without one, all before it.
    head, tail_begin = first_window * S - begin, tl.maximum(first_window, past_window) * S
    n_loose = head + end - tail_begin
    total = tl.zeros((R, C), dtype=tl.float32)
    for first in range(0, n_loose, R):
        place = first + tl.arange(0, R)
        slot = tl.where(place < head, begin + place, tail_begin + place - head)
        weight = tl.load(weights + slot, mask=place < n_loose, other=0.0).to(tl.float32)
        token = tl.load(tokens + slot, mask=place < n_loose, other=0)
        total = add_rows(total, x, token, weight, channel, width)
    for first in range(first_window, past_window, R):
        window = first + tl.arange(0, R)
        one = (window < past_window).to(tl.float32)
        total = add_rows(total, partial, window, one, channel, width)
    summed = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + latent * width + channel, summed, mask=channel < width)
