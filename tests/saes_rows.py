"""What the rows of tests/test_saes.py are made of: planted data, laws of L0, training by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from saes_reference import planted, space_of
from torch import Tensor

from saetrain.artefact import Inference
from saetrain.codes import Codes, SparseCodes, l0
from saetrain.saes import make_sae
from saetrain.saes.base import SAE, Progress

HOOK = "resid.2"
D, FEATURES, ACTIVE = 16, 24, 2
X, TRUE = planted(4096, D, FEATURES, ACTIVE, seed=7)  # not the seed of weights: equal draws
SPACES = {HOOK: space_of(X, HOOK)}
UNITS = list(itertools.product(["none", "mean"], ["none", "sqrt_d", "unit"]))
ALL = slice(None)
END = Progress(step=1000, n_steps=1000, tokens=100_000)

Law = Callable[[Codes, Tensor], None]  # (codes, pre-activations)


def exactly(k: int) -> Law:
    """L0 is k wherever at least k pre-activations h are positive, and all positive ones if not."""

    def law(codes: Codes, h_BF: Tensor) -> None:
        assert torch.equal(l0(codes), (h_BF > 0).sum(-1).clamp(max=k))

    return law


def one_of_each(k: int) -> Law:
    """L0 is the number of groups with a positive pre-activation."""

    def law(codes: Codes, h_BF: Tensor) -> None:
        groups = h_BF.reshape(len(h_BF), k, -1)
        assert torch.equal(l0(codes), (groups > 0).any(-1).sum(-1))

    return law


def on_average(k: float) -> Law:
    """k·B latents fire in all, or all positive ones if those are fewer."""

    def law(codes: Codes, h_BF: Tensor) -> None:
        assert l0(codes).sum() == min(round(k * len(h_BF)), int((h_BF > 0).sum()))

    return law


def above(threshold: float) -> Law:
    def law(codes: Codes, h_BF: Tensor) -> None:
        assert torch.equal(l0(codes), (h_BF > threshold).sum(-1))

    return law


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture or preset. Rows with other hooks give `acts`."""

    name: str  # of the preset or architecture
    values: dict[str, Any] = field(default_factory=dict)
    trained: Law  # L0 in training
    inferred: Law  # L0 of encode, before any training
    reference: Callable[..., dict[str, Tensor]]  # (w, x, dead, kind, variance) -> loss terms
    recovers: float = 0.9  # mean max cosine with a planted dictionary after a short training
    recovery_values: dict[str, Any] = field(default_factory=dict)  # for that training
    lr: float = 5e-3
    more: str = ""  # tells rows of one name apart
    acts: Mapping[str, Tensor] = field(default_factory=lambda: {HOOK: X})  # hook -> rows

    def config(self, **more: Any) -> dict[str, Any]:
        base = {"name": self.name, "n_latents": 48, "dead_after_tokens": 10**7}
        return {**base, **self.values, **more}

    def make(self, seed: int = 0, **more: Any) -> SAE:
        torch.manual_seed(seed)
        return make_sae(self.config(**more), {h: space_of(x, h) for h, x in self.acts.items()})

    half_error: float = 0.03  # of bfloat16 inference, relative
    half_gradient: float = 0.1  # of bfloat16 training
    passes_by: bool = False  # something reaches the output past the latents
    rows_per_token: int = 1  # that there are latents of

    @property
    def lead(self) -> tuple[int, ...]:
        """Dimensions of latents between token and latent."""
        return (self.rows_per_token,) if self.rows_per_token > 1 else ()

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (D,)

    def flat(self, h: Tensor) -> Tensor:
        """Pre-activations (..., F) as rows (B, F)."""
        return h.flatten(1)

    def norms(self, W_dec: Tensor, policy: str) -> Tensor:
        """What effective decoder rows have 1 of."""
        return W_dec.norm(dim=1)

    def batch(self, rows: slice = ALL) -> dict[str, Tensor]:
        """Rows of every hook."""
        return {hook: x[rows] for hook, x in self.acts.items()}

    def inputs(self, sae: SAE | Inference, rows: slice = ALL) -> Tensor:
        """What `encode` takes: rows of one hook, or of several stacked."""
        each = [self.acts[hook][rows] for hook in sae.hooks_in]
        return each[0] if len(each) == 1 else torch.stack(each, dim=1)

    def terms(self, sae: SAE, w: dict[str, Tensor], rows: slice, kind: str) -> dict[str, Tensor]:
        """The reference's loss terms."""
        x = (self.acts[HOOK][rows].double() - sae.in_center) * sae.in_scale
        return self.reference(w, x, sae.dead, kind, sae.in_variance.item())


def rows_apart(codes: Codes) -> Codes:
    """Codes (..., F) as rows (N, F)."""
    if isinstance(codes, Tensor):
        return codes.flatten(0, -2)
    values, indices = codes.values.flatten(0, -2), codes.indices.flatten(0, -2)
    return SparseCodes(values, indices, codes.n_latents)


def train(
    sae: SAE,
    steps: int,
    x: Tensor | Mapping[str, Tensor] = X,
    lr: float = 5e-3,
    batch: int = 256,
) -> list[float]:
    """The trainer's order of calls; the reconstruction loss of each step."""
    acts = {HOOK: x} if isinstance(x, Tensor) else x
    n_rows = len(next(iter(acts.values())))
    optim = torch.optim.Adam(sae.parameters(), lr)
    gen, seen = torch.Generator().manual_seed(1), []
    for step in range(steps):
        optim.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        rows_B = torch.randint(0, n_rows, (batch,), generator=gen)
        seen_now = {hook: rows[rows_B] for hook, rows in acts.items()}
        progress = Progress(step=step, n_steps=steps, tokens=(step + 1) * batch)
        if step == 0:
            sae.init_from_data(seen_now)
        losses = sae.losses(seen_now, progress)
        optim.zero_grad()
        losses.total.backward()
        sae.before_step()
        optim.step()
        sae.after_step()
        sae.note_firing(losses.codes)
        seen.append(losses.terms["reconstruction"].item())
    return seen


def weights(sae: SAE) -> dict[str, Tensor]:
    """Copies of the weights that record gradients of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}


def shake(sae: SAE, size: float = 0.1) -> SAE:
    """Move every weight but thresholds off its special starting value."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if not name.endswith("threshold"):
                p += size * torch.randn(p.shape, generator=gen).to(p)
    return sae


def assert_equal_gradients(sae: SAE, w: Mapping[str, Tensor]) -> None:
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, msg=lambda m, n=name: f"{n}: {m}")
