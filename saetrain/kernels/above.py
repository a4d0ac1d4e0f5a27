"""Encode, and keep what lies above a floor of each latent (ReLU, JumpReLU), with a sparse backward.

A ReLU needs the pre-activations above 0. A JumpReLU needs those above θ for its values and those
within the kernel's reach of θ for its straight-through gradients; both are among h > θ - reach. One
comparison over each piece of the product, read eight results at a time, finds these (token, latent)
pairs: a ragged list, padded to the largest number of any token. What follows is elementwise on it.

Early in training most latents may fire, and a matrix product is cheaper. So the first tokens of the
batch are counted, and where more than one latent in 16 is found, None is the answer, and the caller
makes dense codes. That choice depends on weights and batch alone: a resumed run repeats it.
Numbers of slots are data, so this is for the CPU; a GPU would have to wait for them.

bf16: the product is made in bfloat16 and proposes what lies above the floor less a margin, four
times the error expected of rounding; values are then computed in float32. So only the choice can
err, by latents whose error goes beyond the margin (tests/test_above.py has their share).
NaN is never below a floor, so it is kept and shows.

Plain twin: `saetrain.activations.JumpReLU.select(x @ W + b)`, and `relu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.kernels import cpu
from saetrain.kernels.encode import LEAST, Slots, dead_slots, encode_with, pieces
from saetrain.kernels.gemm import product
from saetrain.kernels.latents import dot_pairs

DENSE = 1 / 16  # share of the latents from which on a matrix product is cheaper (measured)


def encode_above(
    x_BD: Tensor,
    W_DF: Tensor,
    b_F: Tensor,
    floor_F: Tensor,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
    bf16: bool = False,
) -> tuple[Slots, Tensor, Slots] | None:
    """((h, indices), used, AuxK's (values, indices)), or None where dense codes are cheaper.

    h (B, K) are all pre-activations above `floor_F`, differentiable in W and b; `used` (B, K) says
    which slots are some, others hold 0 at latent 0. CPU only.
    """
    finder = _Finder(x_BD, W_DF.detach(), b_F.detach(), floor_F.detach(), bf16)
    finder.dead_F, finder.k_aux = dead_F, k_aux if dead_F is not None else 0
    with torch.no_grad(), torch.autocast(x_BD.device.type, enabled=False):
        if not finder.take(slice(0, LEAST), limit=DENSE):
            return None
        for piece in pieces(max(0, len(x_BD) - LEAST), W_DF.shape[1], "cpu"):
            finder.take(slice(LEAST + piece.start, LEAST + piece.stop))
        found, used = finder.padded()
    slots, aux = encode_with(lambda: found, x_BD, W_DF, b_F, cut=False)
    return slots, used, aux


def above(h_BF: Tensor, floor_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, latents, counts): what is not at most its floor, token after token, as one list.

    values and latents are (n,), counts (B,) how many a token has. The floor may be (1,).
    """
    if cpu.takes(h_BF, floor_F):
        return cpu.above(h_BF, floor_F)
    at = _places(h_BF.le(floor_F).logical_not_())
    token = at // h_BF.shape[1]
    counts = torch.bincount(token, minlength=len(h_BF))
    return h_BF.reshape(-1)[at], at - token * h_BF.shape[1], counts


def _places(found_BF: Tensor) -> Tensor:
    """(n,) places, ascending, of what is True, rows laid end to end; read eight at a time."""
    if found_BF.numel() % 8:
        return found_BF.reshape(-1).nonzero().squeeze(1)
    eights = found_BF.reshape(-1, 8)
    some = eights.view(torch.int64).squeeze(1).nonzero().squeeze(1)
    places = some[:, None] * 8 + torch.arange(8)
    return places[eights[some]]


def pad(values: Tensor, latents: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A ragged list by token as values, indices and used, (B, K), K the most of any, at least 1."""
    n_tokens, n = len(counts_B), len(values)
    token = torch.arange(n_tokens).repeat_interleave(counts_B)
    place = torch.arange(n) - (counts_B.cumsum(0) - counts_B)[token]
    shape = n_tokens, max(1, int(counts_B.max()))
    wide, indices = values.new_zeros(shape), latents.new_zeros(shape)
    wide[token, place] = values
    indices[token, place] = latents
    return wide, indices, torch.arange(shape[1]) < counts_B[:, None]


class _Finder:
    """Collects slots piece by piece."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor, floor: Tensor, bf16: bool) -> None:
        self.x, self.W, self.b, self.bf16 = x, W.to(x.dtype), b.to(x.dtype), bf16
        self.floor = floor.to(x.dtype)
        self.values, self.latents, self.counts = list[Tensor](), list[Tensor](), list[Tensor]()
        self.aux = list[Slots]()
        self.dead_F: Tensor | None = None
        self.k_aux = 0
        if bf16:
            self.half = self.W.bfloat16(), self.b.bfloat16()
            self.floor = self.floor - self._margin()

    def _margin(self) -> Tensor:
        """(F,) Four times: two inputs rounded by 2^-9, independently over D, and the result."""
        size_F: Tensor = self.x.norm(dim=1).max() * self.W.norm(dim=0) / len(self.W) ** 0.5
        return size_F.mul_(2**0.5).add_(self.floor.abs()).mul_(2**-7)

    def take(self, piece: slice, limit: float = torch.inf) -> bool:
        """Add the slots of some tokens, unless they are more than the share `limit`: False."""
        x = self.x[piece]
        if self.bf16:
            h_BF = product(x.bfloat16(), *self.half)
        else:
            h_BF = product(x, self.W, self.b)
        values, latents, counts = above(h_BF.to(x.dtype), self.floor)
        if len(values) > limit * h_BF.numel():
            return False
        if self.bf16:
            token = torch.arange(len(x)).repeat_interleave(counts)
            values = dot_pairs(x, self.W.T, token, latents) + self.b[latents]
        self.values.append(values)
        self.latents.append(latents)
        self.counts.append(counts)
        if self.k_aux:
            assert self.dead_F is not None
            self.aux.append(dead_slots(h_BF, x, self.W.T, self.b, self.dead_F, self.k_aux))
        return True

    def padded(self) -> tuple[list[Tensor], Tensor]:
        """What `encode_with` wants, and which slots are used."""
        values, latents, counts = (torch.cat(t) for t in (self.values, self.latents, self.counts))
        h_BK, indices_BK, used_BK = pad(values, latents, counts)
        if not self.k_aux:
            return [h_BK, indices_BK, h_BK[:, :0], indices_BK[:, :0]], used_BK
        aux, aux_indices = (torch.cat(t) for t in zip(*self.aux, strict=True))
        return [h_BK, indices_BK, aux, aux_indices], used_BK
