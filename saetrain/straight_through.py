"""Straight-through gradients of thresholds: f = h 1[h > θ] and its count 1[h > θ], learned in θ.

Both are flat or undefined in θ. Their gradients here are those of the expectation over h + ε ξ, ξ
drawn from a kernel K of width 1 (Rajamanoharan et al. 2024, arXiv 2407.14435): a latent pulls at
its threshold only while it is within the kernel's reach of it. Bias: grows with ε.

Shapes: h (..., F) with θ (F,), or both (..., K), one threshold a slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Literal["rectangle", "triangle", "epanechnikov", "gaussian"]

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {  # densities over u
    "rectangle": lambda u: (u.abs() < 0.5).to(u.dtype),
    "triangle": lambda u: (1 - u.abs()).relu(),
    "epanechnikov": lambda u: 0.75 * (1 - u.square()).relu(),
    "gaussian": lambda u: torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi),
}

REACH = {"rectangle": 0.5, "triangle": 1.0, "epanechnikov": 1.0, "gaussian": math.inf}  # of |u|


class Jump(torch.autograd.Function):
    """h 1[h > θ]. ∂/∂θ = -θ K/ε is exact for the expectation over h + ε ξ, with ξ drawn from K."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, kernel: Any, to_input: bool) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.kernel, ctx.to_input = kernel, to_input
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        less = ctx.kernel(h, threshold).mul_(threshold).mul_(grads[0]).neg_()
        grad_h = grads[0] * (h > threshold)
        if ctx.to_input:
            grad_h = grad_h - less.to(grad_h.dtype)
        return grad_h, _summed(less, threshold), None, None


class Step(torch.autograd.Function):
    """1[h > θ]. ∂/∂θ = -K/ε, of the same expectation."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, kernel: Any, to_input: bool) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.kernel, ctx.to_input = kernel, to_input
        return (h > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        near = ctx.kernel(h, threshold) * grads[0]
        grad_h = near.to(h.dtype) if ctx.to_input else None
        return grad_h, -_summed(near, threshold), None, None


def _summed(x: Tensor, threshold: Tensor) -> Tensor:
    """x, over tokens where thresholds are one a latent and not one a slot."""
    return x if x.shape == threshold.shape else x.reshape(-1, x.shape[-1]).sum(0)
