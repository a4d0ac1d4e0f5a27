"""The row of tests/test_saes.py that reads whole contexts, with masks in which all rows are there.

tests/test_lorsa.py has contexts with holes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lorsa_reference import reference_heads, reference_terms
from saes_reference import Terms, space_of, topk_oracle
from saes_rows import Row, exactly
from torch import Tensor

from saetrain.saes import make_sae
from saetrain.saes.base import SAE
from saetrain.units import MASK, PRESENT

S, T, D, E = 520, 5, 8, 6
GEN = torch.Generator().manual_seed(17)


def contexts() -> dict[str, Tensor]:
    """Outputs are sums of what directions of the row before write, where they are positive."""
    x = torch.randn(S, T, D, generator=GEN)
    reads, writes = torch.randn(D, 8, generator=GEN), torch.randn(8, E, generator=GEN)
    y = torch.zeros(S, T, E)
    y[:, 1:] = (x[:, :-1] @ reads).relu() @ writes
    there = torch.ones(S, T, dtype=torch.bool)
    return {"resid.1": 2 * x + 1, "attn.2": y + 3, MASK: there, PRESENT: there}


@dataclass(frozen=True, kw_only=True)
class ContextRow(Row):
    """`acts` are (S, T, d) and masks; slices are of contexts."""

    def make(self, seed: int = 0, **more: object) -> SAE:
        torch.manual_seed(seed)
        hooks = {h: x.flatten(0, 1) for h, x in self.acts.items() if x.dim() == 3}
        spaces = {h: space_of(x, h) for h, x in hooks.items()}
        return make_sae(self.config(**more), spaces)

    @property
    def lead(self) -> tuple[int, ...]:
        return (T,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (T, E)

    def flat(self, h: Tensor) -> Tensor:
        return h.flatten(0, -2)

    def terms(self, sae: SAE, w: dict[str, Tensor], rows: slice, kind: str) -> Terms:
        """Standardised here from the data itself: mean off, mean length √d."""
        (x, _), (y, variance) = (self._own(h, rows) for h in ("resid.1", "attn.2"))
        h = reference_heads(w, x, None, 10_000.0, 16).flatten(0, 1)
        some = {"aux_k": 3, "kind": kind, "variance": variance}
        return reference_terms(
            w,
            h,
            y.flatten(0, 1),
            lambda h, w: topk_oracle(h, 2),
            lambda f, h, w: {},
            sae.dead,
            **some,
        )

    def _own(self, hook: str, rows: slice) -> tuple[Tensor, float]:
        every = self.acts[hook].flatten(0, 1)
        mean, x = every.mean(0), every.double()
        scale = (x.shape[1] ** 0.5 / x.norm(dim=1).mean()).float().double()  # as it is kept
        variance = float((x * scale).var(0, correction=0).sum())
        return (self.acts[hook][rows].double() - mean) * scale, variance


LORSA = ContextRow(
    name="lorsa",
    values={"k": 2, "aux_k": 3, "heads_per_qk": 16, "d_qk": 4, "hook_out": "attn.2"},
    trained=exactly(2),
    inferred=exactly(2),
    reference=reference_terms,
    acts=contexts(),
    half_error=0.1,  # 2 % of rows choose another of nearly equal heads; the others are within 0.4 %
)
SEQUENCES = [LORSA]
