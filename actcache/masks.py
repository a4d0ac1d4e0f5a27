"""Attention that stops at documents: masks and positions for packed contexts.

A context holds several documents. With `attend_across_documents=false` every token sees the tokens
that it would see if its document were alone: those before it in a causal host, all of the document
in an encoder, within the window where attention has one; positions count from the document's start.

Whether a host heeds such a mask is found out, not believed: `check_isolation` compares a document
behind another one with the same document alone. It costs three short forward passes.

Shapes: B contexts, T tokens of the longest. Source of the window rules: transformers'
masking_utils (causal: q − k < window; both ways: |q − k| ≤ window).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actcache.errors import HostError
from actcache.families import is_causal
from actcache.store import FLAG_BOS, FLAG_DOC_START

Masks = Tensor | dict[str, Tensor]
# Relative error of a document's median token against the document alone, by number type.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_REMEDY = "use pack.attend_across_documents=true, or contexts of one document each"


def document_masks(
    model: nn.Module, starts: Sequence[NDArray[np.bool_]], device: torch.device
) -> tuple[Masks, Tensor]:
    """Masks (B, 1, T, T) and positions (B, T) for contexts whose documents begin at `starts`.

    Several masks by layer type where the host has more than one kind of attention. HostError for
    a kind that cannot be restarted.
    """
    document_BT, positions_BT = _documents(starts)
    T = document_BT.shape[1]
    q_TT, k_TT = torch.arange(T)[:, None], torch.arange(T)[None]
    causal = is_causal(model)
    seen_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    if causal:
        seen_BTT = seen_BTT & (k_TT <= q_TT)
    config: Any = model.config
    text = config.get_text_config()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    kernel = str(getattr(text, "_attn_implementation", None) or "sdpa")

    def near(window: int) -> Tensor:
        off_TT = q_TT - k_TT
        return seen_BTT & ((off_TT < window) if causal else (off_TT.abs() <= window))

    found = {
        kind: _for_kernel(near(window) if window else seen_BTT, kernel, dtype).to(device)
        for kind, window in _windows(text).items()
    }
    masks: Masks = found if len(found) > 1 else next(iter(found.values()))
    return masks, positions_BT.to(device)


def document_starts(flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where the documents of a context begin; a BOS in front goes with the first of them."""
    starts: NDArray[np.bool_] = (flags & FLAG_DOC_START) != 0
    if len(flags) > 1 and flags[0] & FLAG_BOS:
        starts[1] = False
    return starts


def _documents(starts: Sequence[NDArray[np.bool_]]) -> tuple[Tensor, Tensor]:
    """Number of each token's document and its position in it (B, T); padding is number -1."""
    B, T = len(starts), max(map(len, starts))
    document_BT = torch.full((B, T), -1)
    positions_BT = torch.zeros((B, T), dtype=torch.int64)
    for row, start in enumerate(starts):
        here = np.arange(len(start))
        begin = np.maximum.accumulate(np.where(start, here, 0))
        document_BT[row, : len(start)] = torch.from_numpy(np.cumsum(start))
        positions_BT[row, : len(start)] = torch.from_numpy(here - begin)
    return document_BT, positions_BT


def _windows(text: Any) -> dict[str, int | None]:
    """Window of each kind of attention layer; None sees the whole document."""
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    window = getattr(text, "sliding_window", None)
    if not kinds:
        used = getattr(text, "use_sliding_window", True)
        return {"": window if used else None}
    known = {"full_attention": None, "sliding_attention": window}
    other = [kind for kind in kinds if kind not in known]
    if other:
        raise HostError(
            f"pack.attend_across_documents=false: the host has layers of {', '.join(other)}, "
            f"which a mask of documents cannot restart; {_REMEDY}"
        )
    return {kind: known[kind] for kind in kinds}


def _for_kernel(seen_BTT: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T): booleans for sdpa, numbers to be added to the scores for eager attention."""
    mask = seen_BTT[:, None]
    if kernel == "sdpa":
        return mask
    if kernel == "eager":
        zero, least = torch.zeros((), dtype=dtype), torch.finfo(dtype).min
        return torch.where(mask, zero, torch.full((), least, dtype=dtype))
    raise HostError(
        f"pack.attend_across_documents=false: host.attention={kernel} takes no mask of documents; "
        f"use host.attention=sdpa, or {_REMEDY.removeprefix('use ')}"
    )


def check_isolation(
    run: Callable[[Sequence[NDArray[np.bool_]], NDArray[np.int64]], Mapping[str, Tensor]],
    vocab: int,
    dtype: torch.dtype,
) -> None:
    """HostError unless a document behind another gives what it gives alone.

    `run(starts, ids_BT)` gives the hooked tensors (B, T, d) by name.
    """
    ids = (np.arange(16, dtype=np.int64) * 7 + 3) % vocab
    begin = np.isin(np.arange(16), (0, 6))
    packed = run([begin], ids[None])
    alone = run([begin[6:]], ids[None, 6:])
    for name, x in packed.items():
        ours_TD, theirs_TD = x[0, 6:].float(), alone[name][0].float()
        off_T = (ours_TD - theirs_TD).norm(dim=-1) / theirs_TD.norm(dim=-1).clamp_min(1e-30)
        if not float(off_T.median()) <= _TOLERANCE.get(dtype, 1e-1):
            raise HostError(
                f"pack.attend_across_documents=false: this host does not keep documents apart. A "
                f"document behind another gives hook {name!r} activations that are "
                f"{float(off_T.median()):.1%} off those of the document alone; {_REMEDY}"
            )
