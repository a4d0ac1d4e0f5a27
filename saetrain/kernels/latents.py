"""What the backwards of encoder and decoder are made of, without a (B K, D) or a (B, F) tensor.

`dot_rows` gives for each slot x_b · W_i, `sum_by_latent` for each latent the weighted sum of the
token rows that chose it. Slots sorted by latent turn that sum into bags of token rows, so it is a
gather with a fixed order of summation instead of a scatter; 2BKD operations each, against 2BDF.

On a CPU the (F, D) result is made in pieces that stay in cache and is written into the memory of
the parameter's last gradient if nobody holds that any more: fresh memory of this size is mapped
page by page, which costs ten times as much as writing it (137 ms against 9 ms for 150 MB here).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saetrain.kernels import cpu
from saetrain.kernels.triton_common import takes
from saetrain.kernels.triton_latents import launch_dot, launch_sum

PIECE = 1 << 18  # elements of a piece: 1 MB
LARGE = 1 << 22  # elements from which fresh memory comes page by page from the system

_homes: Any = WeakTensorKeyDictionary()  # parameter -> memory of its gradient


def dot_rows(
    x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, used_BK: Tensor | None = None
) -> Tensor:
    """(B, K): x_b · W[indices_bk]. Plain twin: torch.einsum("bd,bkd->bk", x, W[indices]).

    Where `used_BK` is False, 0 without a product; only on the CPU, as others would wait for it.
    """
    n, k = indices_BK.shape
    if cpu.takes(x_BD, W_FD):
        return cpu.dot_rows(x_BD, W_FD, indices_BK, used_BK)
    if used_BK is not None:
        pairs = dot_pairs(x_BD, W_FD, used_BK.nonzero()[:, 0], indices_BK[used_BK])
        return x_BD.new_zeros(n, k).masked_scatter_(used_BK, pairs)
    if takes("dot_rows", x_BD):
        return launch_dot(x_BD, W_FD, indices_BK)
    token = torch.arange(n, device=x_BD.device).repeat_interleave(k, output_size=n * k)
    return dot_pairs(x_BD, W_FD, token, indices_BK.reshape(-1)).reshape(n, k)


def dot_pairs(x_BD: Tensor, W_FD: Tensor, tokens: Tensor, latents: Tensor) -> Tensor:
    """(n,): x[tokens] · W[latents], pair by pair; tokens ascend."""
    if not len(tokens):
        return x_BD.new_zeros(0)
    bags = torch.zeros(len(x_BD), dtype=latents.dtype, device=latents.device)  # it reads none
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_BD.contiguous(), W_FD, latents, bags, tokens, 0
    )
    return out


def sum_by_latent(
    x_BD: Tensor, weights_BK: Tensor, indices_BK: Tensor, n_latents: int, home: Tensor | None = None
) -> Tensor:
    """(F, D): row i sums weights_bk x_b over the slots with indices_bk = i.

    `home` is the parameter that the result is a gradient of, (F, D) or (D, F): its memory is used
    again. Slots of weight 0 are left out on the CPU. Plain twin:
    `SparseCodes(weights, indices, F).dense().T @ x`.
    """
    if cpu.takes(x_BD, weights_BK):
        return cpu.sum_by_latent(x_BD, weights_BK, indices_BK, _memory(x_BD, n_latents, home))
    if takes("sum_by_latent", x_BD):
        return launch_sum(x_BD, weights_BK, indices_BK, n_latents)
    weights, latents, used = weights_BK.reshape(-1), indices_BK.reshape(-1), None
    if may_count(x_BD):
        used = weights.nonzero().squeeze(1)
        weights, latents = weights[used], latents[used]
    # Half as wide indices sort twice as fast; stable, so the order of summation is fixed.
    by_latent, order = latents.to(torch.int32).sort(stable=True)
    edges = torch.arange(n_latents + 1, device=x_BD.device, dtype=torch.int32)
    starts = torch.searchsorted(by_latent, edges)
    weights, slots = weights[order], order if used is None else used[order]
    tokens = slots // indices_BK.shape[-1]
    if x_BD.device.type != "cpu" or n_latents * x_BD.shape[1] < LARGE:
        return _bags(x_BD, tokens, weights, starts[:-1])
    out_FD = _memory(x_BD, n_latents, home)
    step = max(1, PIECE // x_BD.shape[1])
    firsts = range(0, n_latents, step)
    edge = [*starts[:-1:step].tolist(), len(tokens)]  # on the CPU: nothing to wait for
    for first, (begin, end) in zip(firsts, pairwise(edge), strict=True):
        rows = slice(first, min(first + step, n_latents))
        here = slice(begin, end)
        out_FD[rows] = _bags(x_BD, tokens[here], weights[here], starts[rows] - begin)
    return out_FD


def may_count(x: Tensor) -> bool:
    """Whether sizes may depend on data: a GPU would have to be waited for, tracing would stop."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _bags(x_BD: Tensor, tokens: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    return nnf.embedding_bag(tokens, x_BD, starts, per_sample_weights=weights, mode="sum")


def _memory(x_BD: Tensor, n_latents: int, home: Tensor | None) -> Tensor:
    """Memory for (F, D): that of the last gradient of `home` if nobody else refers to it."""
    shape = (n_latents, x_BD.shape[1])
    if home is None:
        return x_BD.new_empty(shape)
    last = _homes.get(home)
    if last is None or last.shape != shape or last.dtype != x_BD.dtype or not _unused(last):
        last = _homes[home] = x_BD.new_empty(shape)
    memory: Tensor = last.detach()
    return memory  # a tensor of its own, which autograd may keep as it is


def _unused(memory: Tensor) -> bool:
    """Whether `memory` is the only tensor that refers to its storage."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    # Two: the tensor, and the object made for the question.
    return count is not None and count(memory.untyped_storage()._cdata) <= 2
