"""Rows or whole contexts: what an SAE reads at once, and what a batch hands to it.

Most architectures see each row by itself (`unit = "token"`); one that attends sees whole contexts
(`unit = "sequence"`). Its batches hold, beside the hooks as (S, T, d), these columns (S, T), under
names that no hook can have:

MASK      bool, the row counts: in losses, in metrics, as a token that latents fire on
PRESENT   bool, the row is there and may be attended to; others are zeros
DOCUMENT  int64, only where the host kept packed documents apart: rows attend within their own
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from saetrain.codes import Codes, SparseCodes

Unit = Literal["token", "sequence"]
MASK, PRESENT, DOCUMENT = "@mask", "@present", "@document"


def unit_of(sae: object) -> Unit:
    """What `sae` reads at once; an object that does not say reads single rows."""
    unit: Unit = getattr(sae, "unit", "token")
    return unit


def at(codes: Codes, mask: Tensor) -> Codes:
    """The codes of the rows where `mask` (...) is True, (N, F)."""
    if isinstance(codes, SparseCodes):
        return SparseCodes(codes.values[mask], codes.indices[mask], codes.n_latents)
    return codes[mask]


def first_rows(codes: Codes, n: int) -> Codes:
    """The codes of the first `n` rows."""
    if isinstance(codes, SparseCodes):
        return SparseCodes(codes.values[:n], codes.indices[:n], codes.n_latents)
    return codes[:n]


def encode_counted(sae: Any, inputs: Mapping[str, Tensor], hook: str) -> Codes:
    """Latents (N, F) of the rows that count of a batch of contexts."""
    codes: Codes = sae.encode(inputs[hook], inputs[PRESENT], inputs.get(DOCUMENT))
    return at(codes, inputs[MASK])
