"""Sparse decode on CUDA in Triton: one program a token and a block of channels, no atomics.

x̂[b, e] = Σ_k f[b, k] W[i[b, k], e], summed in float32 in a fixed order. Reads BKE numbers and
writes BE. Slots of value 0 read nothing. Plain twin: `embedding_bag`, which is also what is used
where the kernel is not (triton_common.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as nnf
from torch import Tensor

from saetrain.kernels.triton_common import (
    CHANNELS,
    KERNELS,
    ROWS,
    Kernel,
    blocks,
    opaque,
    spread,
    takes,
)


def plain(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """The twin: (B, E)."""
    return nnf.embedding_bag(indices_BK, W_FE, per_sample_weights=values_BK, mode="sum")


def decode_forward(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """(B, E) = Σ_k values · W[indices], by the kernel on CUDA where it works; no gradient."""
    if takes("decode", W_FE):
        return launch_decode(values_BK, indices_BK, W_FE)
    return plain(values_BK, indices_BK, W_FE)


def empty(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """(B, E), of the type of W."""
    return W_FE.new_empty(len(values_BK), W_FE.shape[1])


@opaque(empty)
def launch_decode(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """The kernel, unchecked."""
    from saetrain.kernels import triton_kernels

    out_BE = empty(values_BK, indices_BK, W_FE)
    (n_tokens, width), n_slots = out_BE.shape, values_BK.shape[1]
    triton_kernels.decode[n_tokens, blocks(width, CHANNELS)](
        values_BK.contiguous(), indices_BK.contiguous(), W_FE.contiguous(), out_BE,
        n_slots, width, ROWS, CHANNELS,
    )  # fmt: skip
    return out_BE


def sample(randn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Arguments to compare on: more than one block of slots and of channels."""
    return randn(5, ROWS + 3), spread(5 * (ROWS + 3), 37).reshape(5, -1), randn(37, CHANNELS + 16)


KERNELS["decode"] = Kernel(launch_decode, plain, sample)
