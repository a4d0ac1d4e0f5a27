"""Encoders of equal shape and input in one product, for SAEs that train on the same batch.

x' W of J encoders is one product of (B, D) with (D, J F) instead of J of (B, D) with (D, F): small
SAEs may be bound by launches, not by arithmetic. The weights stay the parameters they were; only
their memory moves into one tensor, one latent after the other, as the fastest product wants it.
As for one SAE the product is made in pieces that stay in cache, and each SAE's k largest are taken
there. Each SAE's biases go into one: (x' - b_dec) W + b_enc = x' W + (b_enc - b_dec W), which
rounds differently, so a stacked run equals its single run within rounding, not bit for bit, and
latents near a tie may be selected otherwise.

Applies to TopK dictionaries with rows of length 1 that read one hook in the same units, in fp32 and
whole batches; others encode by themselves. On a CPU it is as fast as single products (docs/LOG.md);
on a GPU it costs the pre-activations (B, F) of all J at once.

Shapes: B tokens, D width, F latents, J SAEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from saetrain.activations import TopK
from saetrain.dictionary import Dictionary
from saetrain.kernels.encode import joined, pieces, slots_of
from saetrain.kernels.gemm import product
from saetrain.stream import Batch

_OWN = ("pick", "_pick_topk", "_encoder_terms", "inputs", "weights", "standardise")


@dataclass
class _Shelf:
    """SAEs whose encoders lie one after the other in `W_JDF`."""

    saes: list[Dictionary]
    W_JFD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.W_JFD = torch.stack([s.W_enc.data.T for s in self.saes])
        for sae, W_FD in zip(self.saes, self.W_JFD, strict=True):
            sae.W_enc.data = W_FD.T

    def leave(self, rest: list[Dictionary]) -> None:
        """Go on with fewer: their memory is set apart from that of those who left."""
        self.saes = rest
        self.__post_init__()

    def moved(self) -> bool:
        """Whether something gave an encoder other memory."""
        pairs = zip(self.saes, self.W_JFD, strict=True)
        return any(sae.W_enc.data_ptr() != W_FD.data_ptr() for sae, W_FD in pairs)

    @torch.no_grad()
    def encode(self, batch: Batch) -> None:
        x_BD, n = self.saes[0].inputs(batch.inputs), len(self.saes)
        b_JF = torch.stack([s.b_enc - s.b_dec @ s.W_enc for s in self.saes])
        W_DF, b_F = self.W_JFD.flatten(0, 1).T, b_JF.flatten()  # of all
        ks = [cast(TopK, s.activation).cfg.k for s in self.saes]
        sought = [s.aux_search()[1] for s in self.saes]
        found: list[list[list[Tensor]]] = [[] for _ in self.saes]
        for piece in pieces(len(x_BD), len(b_F), x_BD.device.type):
            h_JbF = product(x_BD[piece], W_DF, b_F).chunk(n, dim=1)
            for i, (sae, h_bF) in enumerate(zip(self.saes, h_JbF, strict=True)):
                found[i].append(slots_of(h_bF, ks[i], sought[i], sae.aux_k))
        for sae, parts in zip(self.saes, found, strict=True):
            sae.found = joined(parts)


class Stack:
    """All shelves of a group of jobs."""

    def __init__(self, saes: Sequence[nn.Module]) -> None:
        """Those of `saes` that are alike have their encoders' memory moved."""
        alike: dict[tuple[Any, ...], list[Dictionary]] = {}
        for sae in saes:
            if stackable(sae):
                own = cast(Dictionary, sae)
                alike.setdefault(_shape(own), []).append(own)
        self.shelves = [_Shelf(v) for v in alike.values() if len(v) > 1]

    def __len__(self) -> int:
        """SAEs that are encoded together with another one."""
        return sum(len(s.saes) for s in self.shelves)

    def encode(self, taking: Sequence[nn.Module], batch: Batch) -> None:
        """Hand `found` to those SAEs that take the batch next, where two or more are alike."""
        ids = {id(s) for s in taking}
        for shelf in list(self.shelves):
            present = [s for s in shelf.saes if id(s) in ids]
            if len(present) < 2:
                self.shelves.remove(shelf)
                continue
            if len(present) < len(shelf.saes) or shelf.moved():
                shelf.leave(present)
            shelf.encode(batch)


def stackable(sae: nn.Module) -> bool:
    """Whether the encoder is the plain product that a stack computes."""
    if not isinstance(sae, Dictionary) or not isinstance(sae.activation, TopK):
        return False
    plain = all(getattr(type(sae), n) is getattr(Dictionary, n) for n in _OWN)
    dense = sae.penalty is not None and sae.penalty.needs_pre
    return plain and not dense and sae.cfg.decoder_norm == "unit" and sae.in_center.dim() == 1


def _shape(sae: Dictionary) -> tuple[Any, ...]:
    """Equal for SAEs that may share a product: input, units, widths."""
    units = (sae.in_scale.item(), sae.in_center.cpu().numpy().tobytes())
    return (sae.hooks_in, *sae.W_enc.shape, *units)
