"""Sparse decode on CUDA in Triton: one program a token and a block of channels, no atomics.

x̂[b, e] = Σ_k f[b, k] W[i[b, k], e], summed in float32 in the order of the slots. The plain twin is
`embedding_bag`. Equal to it in Triton's interpreter (TRITON_INTERPRET=1, triton 3.9), but not yet
run on a GPU: `decode_forward` therefore compares the two on a small input of the same type before
the first use, and falls back to the twin, with one line of log, if Triton is missing, does not
compile, or differs.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

triton: Any
tl: Any
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError:  # no CUDA build of torch
    triton = tl = None

BLOCK = 128  # channels of a program
log = logging.getLogger(__name__)


def plain(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """The twin: (B, E)."""
    return nnf.embedding_bag(indices_BK, W_FE, per_sample_weights=values_BK, mode="sum")


def decode_forward(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """(B, E) = Σ_k values · W[indices], by the kernel on CUDA where it works; no gradient."""
    if values_BK.device.type != "cuda" or not usable(W_FE.dtype, W_FE.device):
        return plain(values_BK, indices_BK, W_FE)
    return launch(values_BK, indices_BK, W_FE)


def launch(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """The kernel, unchecked."""
    values, indices, W = values_BK.contiguous(), indices_BK.contiguous(), W_FE.contiguous()
    out_BE = values.new_empty(len(values), W.shape[1], dtype=W.dtype)
    grid = len(values), triton.cdiv(W.shape[1], BLOCK)
    _decode[grid](values, indices, W, out_BE, values.shape[1], W.shape[1], BLOCK=BLOCK)
    return out_BE


@cache
def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel compiles here and equals its twin; says once why not."""
    try:
        if triton is None:
            raise ImportError("triton is not installed")
        draw = torch.Generator().manual_seed(0)
        W = torch.randn(37, BLOCK + 5, generator=draw).to(device, dtype)
        values = torch.rand(6, 3, generator=draw).to(device, dtype)
        indices = torch.randint(37, (6, 3), generator=draw).to(device)
        want = plain(values.float(), indices, W.float())
        torch.testing.assert_close(launch(values, indices, W).float(), want, rtol=0.02, atol=0.02)
    except Exception as e:  # noqa: BLE001 - whatever a compiler raises, there is another way
        reason = str(e).partition("\n")[0]
        log.warning("Triton decode is not used (%s): embedding_bag instead", reason)
        return False
    return True


def _kernel(
    values: Any,
    indices: Any,
    W: Any,
    out: Any,
    n_slots: Any,
    width: Any,
    BLOCK: tl.constexpr,
) -> None:
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(n_slots):
        weight = tl.load(values + token * n_slots + slot).to(tl.float32)
        latent = tl.load(indices + token * n_slots + slot)
        row = tl.load(W + latent * width + channel, mask=inside, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out + token * width + channel, total.to(out.dtype.element_ty), mask=inside)


if triton is not None:
    _decode = triton.jit(_kernel)
