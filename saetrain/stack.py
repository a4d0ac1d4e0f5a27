"""Encoders of equal shape and input in one batched product, for SAEs that train on the same batch.

x' W of J encoders is one product of (B, D) with (J, D, F) instead of J of (B, D) with (D, F): on a
GPU small SAEs may be bound by launches, not by arithmetic; on a CPU it is slower (see docs/LOG.md).
The weights stay the parameters they were; only their memory moves into one tensor. Each SAE then
takes its own biases off:
(x' - b_dec) W + b_enc = x' W + (b_enc - b_dec W), which rounds differently, so a stacked run equals
its single run within rounding, not bit for bit, and latents near a tie may be selected otherwise.

Applies to TopK dictionaries with rows of length 1 that read one hook in the same units, in fp32 and
whole batches; others encode by themselves. Cost: pre-activations (B, F) of all J at once.

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
from saetrain.stream import Batch

_OWN = ("pick", "_pick_topk", "_encoder_terms", "inputs", "weights", "standardise")


@dataclass
class _Shelf:
    """SAEs whose encoders lie one after the other in `W_JDF`."""

    saes: list[Dictionary]
    W_JDF: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.W_JDF = torch.stack([s.W_enc.data for s in self.saes])
        for sae, W_DF in zip(self.saes, self.W_JDF, strict=True):
            sae.W_enc.data = W_DF

    def leave(self, rest: list[Dictionary]) -> None:
        """Go on with fewer: their memory is set apart from that of those who left."""
        self.saes = rest
        self.__post_init__()

    def moved(self) -> bool:
        """Whether something gave an encoder other memory."""
        pairs = zip(self.saes, self.W_JDF, strict=True)
        return any(sae.W_enc.data_ptr() != W_DF.data_ptr() for sae, W_DF in pairs)

    @torch.no_grad()
    def encode(self, batch: Batch) -> None:
        x_BD = self.saes[0].inputs(batch.inputs)
        h_JBF = torch.bmm(x_BD.expand(len(self.saes), -1, -1), self.W_JDF)
        for sae, h_BF in zip(self.saes, h_JBF, strict=True):
            sae.product = h_BF.sub_(sae.b_dec @ sae.W_enc)


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
        """Hand `product` to those SAEs that take the batch next, where two or more are alike."""
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
