"""The two primitives of the backwards on CUDA in Triton: a dot product a slot, a sum a latent.

`dot_rows`: one program a token and 8 of its slots, which reads the chosen rows and writes one
number each. `sum_by_latent`: slots are sorted by latent (stably, so the order of summation is
fixed), and slot counts of latents are very uneven, so the sorted slots are cut into windows of
WINDOW. A window that lies within one latent is summed by a program of its own into `partial`
(BK / WINDOW rows); then one program a latent adds its loose slots, fewer than 2·WINDOW, and its
partial sums. No atomics, results repeat bit by bit; no size depends on data, so nothing waits.
Latents without slots get zeros. Slots of weight 0 are sorted to the end and read nothing.

Cost: reads BKD numbers, writes BK; reads BKD (1 + 1/WINDOW), writes FD. Plain twins: below; the
operations used where the kernels are not are those of latents.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saetrain.kernels.triton_common import CHANNELS, KERNELS, ROWS, Kernel, blocks, opaque, spread

WINDOW = 64  # slots; a multiple of ROWS


def plain_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """The twin of `launch_dot`: (B, K)."""
    return torch.einsum("bd,bkd->bk", x_BD, W_FD[indices_BK])


def plain_sum(x_BD: Tensor, weights_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """The twin of `launch_sum`: (F, D)."""
    dense_BF = x_BD.new_zeros(len(x_BD), n_latents).scatter_add_(1, indices_BK, weights_BK)
    return dense_BF.T @ x_BD


def empty_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """(B, K), of the type of x."""
    return x_BD.new_empty(indices_BK.shape)


@opaque(empty_dot)
def launch_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """(B, K) x_b · W[indices_bk], by the kernel, unchecked."""
    from saetrain.kernels import triton_kernels

    out_BK = empty_dot(x_BD, W_FD, indices_BK)
    n_tokens, n_slots = out_BK.shape
    triton_kernels.dot_rows[n_tokens, blocks(n_slots, ROWS)](
        x_BD.contiguous(), W_FD.contiguous(), indices_BK.contiguous(), out_BK,
        n_slots, x_BD.shape[1], ROWS, CHANNELS,
    )  # fmt: skip
    return out_BK


def empty_sum(x_BD: Tensor, weights_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """(F, D), of the type of x."""
    return x_BD.new_empty(n_latents, x_BD.shape[1])


@opaque(empty_sum)
def launch_sum(x_BD: Tensor, weights_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """(F, D) sums of weights_bk x_b over the slots of each latent, by the kernels, unchecked."""
    from saetrain.kernels import triton_kernels

    out_FD = empty_sum(x_BD, weights_BK, indices_BK, n_latents)
    weights, tokens, by_latent = sort_slots(weights_BK, indices_BK, n_latents)
    edges = torch.arange(n_latents + 1, device=x_BD.device, dtype=by_latent.dtype)
    starts = torch.searchsorted(by_latent, edges)
    n_windows, width = len(weights) // WINDOW, x_BD.shape[1]
    partial = x_BD.new_empty(n_windows, width, dtype=torch.float32)
    slots, tile = (x_BD.contiguous(), weights, tokens), (WINDOW, ROWS, CHANNELS)
    across = blocks(width, CHANNELS)
    triton_kernels.sum_windows[n_windows, across](
        *slots, by_latent, partial, n_latents, width, *tile
    )
    triton_kernels.sum_latents[n_latents, across](*slots, starts, partial, out_FD, width, *tile)
    return out_FD


def sort_slots(
    weights_BK: Tensor, indices_BK: Tensor, n_latents: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(BK,) weights, tokens and latents by ascending latent; n_latents where the weight is 0."""
    weights = weights_BK.reshape(-1)
    # Half as wide indices sort twice as fast.
    latents = indices_BK.reshape(-1).to(torch.int32).masked_fill(weights == 0, n_latents)
    by_latent, order = latents.sort(stable=True)
    return weights[order], order // max(1, indices_BK.shape[1]), by_latent


def sample_dot(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Arguments to compare on: more than one block of slots and of channels."""
    return randn(5, CHANNELS + 16), randn(37, CHANNELS + 16), spread(55, 37).reshape(5, 11)


def sample_sum(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Latent 1 has whole windows and loose slots, five others few, the rest none."""
    n, width = 3 * WINDOW, CHANNELS + 16
    indices = torch.stack([torch.ones(n, dtype=torch.int64, device="cpu"), spread(n, 6)], 1)
    return randn(n, width), randn(n, 2), indices, 37


KERNELS["dot_rows"] = Kernel(launch_dot, plain_dot, sample_dot)
KERNELS["sum_by_latent"] = Kernel(launch_sum, plain_sum, sample_sum)
