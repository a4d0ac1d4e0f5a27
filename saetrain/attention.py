"""Causal attention over whole contexts, as Lorsa's heads use it: patterns made by queries and keys,
each of which serves several heads of width 1.

z_i(t) = Σ_s A_ts x_s · w_V,i,  A_ts = softmax over the reachable s of q_t · k_s / √Q

Row s is reachable from row t if s ≤ t, s is present, and, where documents are kept apart, both are
of one document. torch's fused attention computes it: where the device has such a kernel, the
(S, G, T, T) patterns are never stored. `pattern` gives them for looking at.

Shapes: S contexts, T rows, D width, F heads, G patterns, Q width of queries and keys; ... leading
dimensions, usually S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor


class QK(NamedTuple):
    """What makes attention patterns."""

    W_Q: Tensor  # (G, D, Q)
    b_Q: Tensor  # (G, Q)
    W_K: Tensor  # (G, D, Q)
    b_K: Tensor  # (G, Q)
    rotary_base: float | None


def attend(
    x: Tensor, qk: QK, W_V: Tensor, present: Tensor | None, document: Tensor | None
) -> Tensor:
    """(..., T, F): values of the rows that each row attends to, by the pattern of each head."""
    if x.dim() < 2:
        raise ValueError(f"expected contexts (..., T, D), got one row of shape {tuple(x.shape)}")
    lead, (t, d), n_latents = x.shape[:-2], x.shape[-2:], W_V.shape[1]
    x = x.reshape(-1, t, d)
    q, k = queries_keys(x, qk)
    v = (x @ W_V).reshape(len(x), t, len(qk.W_Q), -1).transpose(1, 2)  # (S, G, T, heads_per_qk)
    masks = [None if m is None else m.reshape(-1, t) for m in (present, document)]
    reach = reachable(x.shape[:-1], x.device, *masks)
    z = nnf.scaled_dot_product_attention(q, k, v, attn_mask=reach[:, None])
    return z.transpose(1, 2).reshape(*lead, t, n_latents)


def queries_keys(x: Tensor, qk: QK) -> tuple[Tensor, Tensor]:
    """(..., G, T, Q) each."""
    q = torch.einsum("...td,gdq->...gtq", x, qk.W_Q) + qk.b_Q[:, None]
    k = torch.einsum("...td,gdq->...gtq", x, qk.W_K) + qk.b_K[:, None]
    if qk.rotary_base is None:
        return q, k
    return rotated(q, qk.rotary_base), rotated(k, qk.rotary_base)


def rotated(q: Tensor, base: float) -> Tensor:
    """Rotary positions: at row t, the plane (i, i + Q/2) turns by t · base^(-2i/Q) (2104.09864)."""
    half = q.shape[-1] // 2
    dtype = torch.promote_types(q.dtype, torch.float32)
    rates = base ** (-torch.arange(half, device=q.device, dtype=dtype) / half)
    angles = torch.arange(q.shape[-2], device=q.device, dtype=dtype)[:, None] * rates
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    a, b = q[..., :half], q[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def reachable(
    shape: torch.Size, device: torch.device, present: Tensor | None, document: Tensor | None
) -> Tensor:
    """(..., T, T) bool: row t may read row s, s ≤ t. A row may always read itself, so that padding,
    which is dropped later, gives numbers and not NaN."""
    t = shape[-1]
    reach = torch.ones(t, t, dtype=torch.bool, device=device).tril().expand(*shape, t)
    if present is not None:
        reach = reach & present[..., None, :]
    if document is not None:
        reach = reach & (document[..., None, :] == document[..., :, None])
    return reach | torch.eye(t, dtype=torch.bool, device=device)


def pattern(x: Tensor, qk: QK, present: Tensor | None, document: Tensor | None) -> Tensor:
    """A (..., G, T, T) of contexts x (..., T, D): row t reads from row s with weight [t, s]."""
    q, k = queries_keys(x, qk)
    scores_GTT: Tensor = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    reach = reachable(x.shape[:-1], x.device, present, document)
    return scores_GTT.masked_fill(~reach[..., None, :, :], float("-inf")).softmax(-1)
