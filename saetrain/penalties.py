"""Sparsity penalties as parts: codes in, one weighted number out. Any architecture takes any of
them, except l0, whose gradient exists only where the activation has a threshold (jumprelu).

With v_i = f_i n_i, where n_i is the size of latent i in the output (its decoder norm; 1 where the
rows have length 1, which is how a free decoder is handled here), mean over tokens of

l1         Σ v_i. With a free decoder this is the norm-weighted L1 of Anthropic, Circuits Updates,
           April 2024; with rows of length 1 that of Bricken et al. 2023. Shrinks all latents.
tanh       Σ tanh(c v_i): an L1 that saturates, so large latents are not shrunk (Anthropic,
           Circuits Updates, January 2025).
tanh_quad  Σ_i φ_i (1 + φ_i / φ₀), φ_i the mean over the batch of tanh(c v_i): also punishes
           latents that fire on many tokens (OpenMOSS, Language-Model-SAEs). Biased up at small
           batches, as φ_i² is.
l0         Σ 1[h_i > θ_i] with straight-through gradients (Rajamanoharan et al. 2024, 2407.14435,
           eq. 9), or ((mean L0) / target - 1)² with a target.
lp         Σ (v_i + ε)^p - ε^p; p < 1 is nearer to L0. With p_end, p falls in steps as training goes
           on and the coefficient is rescaled at each so that the penalty does not jump (p-anneal,
           Karvonen et al. 2024, arXiv 2408.00113). ε keeps the slope at 0 finite.

Every coefficient rises linearly from 0 over the first `warmup_fraction` of training.

Shapes: B tokens, F latents, K active slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from saetrain import losses
from saetrain.activations import Activation, JumpReLU
from saetrain.codes import Codes, SparseCodes
from saetrain.errors import ConfigError
from saetrain.progress import Progress

# -- settings --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """Base of the settings under `sae.penalty`."""

    WORD: ClassVar[str] = "sae.penalty.coefficient"  # what users type for the coefficient

    coefficient: float
    warmup_fraction: float = 0.05  # of training, in which the coefficient rises from 0

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"{self.WORD}: expected 0 or more, got {self.coefficient}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(
                f"sae.penalty.warmup_fraction: expected 0 to 1, got {self.warmup_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class L1Config(PenaltyConfig):
    WORD = "sae.l1_coefficient"
    name: Literal["l1"] = "l1"


@dataclass(frozen=True, kw_only=True)
class TanhConfig(PenaltyConfig):
    name: Literal["tanh"] = "tanh"
    stretch: float = 4.0  # c

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("stretch", self.stretch)


@dataclass(frozen=True, kw_only=True)
class TanhQuadConfig(PenaltyConfig):
    name: Literal["tanh_quad"] = "tanh_quad"
    stretch: float = 4.0  # c
    density: float = 0.01  # φ₀: a latent this dense pays twice

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("stretch", self.stretch)
        _positive("density", self.density)


@dataclass(frozen=True, kw_only=True)
class L0Config(PenaltyConfig):
    name: Literal["l0"] = "l0"
    target: float | None = None  # mean L0 to hold, quadratically; None: the smaller the better

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            _positive("target", self.target)


@dataclass(frozen=True, kw_only=True)
class LpConfig(PenaltyConfig):
    name: Literal["lp"] = "lp"
    p: float = 1.0
    p_end: float | None = None  # p at the end of training; None: p stays
    anneal_from: float = 0.25  # share of training after which p begins to fall
    anneal_updates: int = 10  # equal steps from p to p_end
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("p", "p_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"sae.penalty.{name}: expected above 0 and up to 1, got {value}")
        if not 0 <= self.anneal_from < 1:
            raise ConfigError(
                f"sae.penalty.anneal_from: expected 0 to below 1, got {self.anneal_from}"
            )
        if self.anneal_updates < 1:
            raise ConfigError(
                f"sae.penalty.anneal_updates: expected at least 1, got {self.anneal_updates}"
            )
        _positive("epsilon", self.epsilon)


# -- modules ---------------------------------------------------------------------------------------


class Penalty(nn.Module, ABC):
    """`penalty(codes, pre, norms, progress)` -> scalar, coefficient and warm-up included."""

    needs_pre: ClassVar[bool] = False  # whether it reads dense pre-activations

    def __init__(self, cfg: Any, activation: Activation) -> None:
        super().__init__()
        self.cfg = cfg

    def coefficient(self, progress: Progress) -> float:
        """As warmed up so far."""
        warmup = self.cfg.warmup_fraction
        factor = min(1.0, progress.fraction / warmup) if warmup else 1.0
        return float(self.cfg.coefficient * factor)

    def forward(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        """Codes, their pre-activations where they were made, (..., F), or those of the used slots
        of sparse codes; norms n or None for 1."""
        return self.coefficient(progress) * self.size(codes, pre, norms_F, progress)

    @abstractmethod
    def size(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        """The penalty without its coefficient."""

    def settle(self) -> None:
        """Called after each optimizer step."""


class L1(Penalty):
    def size(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        return losses.l1(codes, norms_F)


class Tanh(Penalty):
    def size(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        return _total(_sizes(codes, norms_F), lambda v: torch.tanh(self.cfg.stretch * v))


class TanhQuad(Penalty):
    def size(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        density_F = _mean_by_latent(codes, torch.tanh(self.cfg.stretch * _sizes(codes, norms_F)))
        return (density_F * (1 + density_F / float(self.cfg.density))).sum()


class L0(Penalty):
    needs_pre = True

    def __init__(self, cfg: L0Config, activation: Activation) -> None:
        super().__init__(cfg, activation)
        if not isinstance(activation, JumpReLU):
            raise ConfigError(
                f"sae.penalty.name=l0 with sae.activation.name={activation.cfg.name}: the gradient "
                "of l0 is that of a threshold, which only sae.activation.name=jumprelu learns"
            )
        self.count = activation.count

    def size(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        if pre is None:
            raise ValueError("l0 needs pre-activations")
        indices, n_tokens = None, pre.shape[:-1].numel()
        if isinstance(codes, SparseCodes):
            indices, n_tokens = codes.indices[codes.used], codes.indices.shape[:-1].numel()
        mean, target = self.count(pre, indices).sum() / n_tokens, self.cfg.target
        return mean if target is None else (mean / float(target) - 1).square()


class Lp(Penalty):
    """State: the factor by which annealing has rescaled the coefficient.

    The factor at a change of p is the ratio of the two penalties on that step's batch.
    """

    factor: Tensor  # ()

    def __init__(self, cfg: LpConfig, activation: Activation) -> None:
        super().__init__(cfg, activation)
        self.register_buffer("factor", torch.ones((), dtype=torch.float32))
        self._next: Tensor | None = None

    def p_at(self, progress: Progress, back: int = 0) -> float:
        """p in force `back` steps ago: a staircase of `anneal_updates` equal steps."""
        p, end, updates = self.cfg.p, self.cfg.p_end, self.cfg.anneal_updates
        if end is None:
            return float(p)
        fraction = (progress.step - back) / max(1, progress.n_steps)
        share = (fraction - self.cfg.anneal_from) / (1 - self.cfg.anneal_from)
        done = min(updates, max(0, int(share * (updates + 1)) if share > 0 else 0))
        return float(p + (end - p) * done / updates)

    def size(
        self, codes: Codes, pre: Tensor | None, norms_F: Tensor | None, progress: Progress
    ) -> Tensor:
        v, p, before = _sizes(codes, norms_F), self.p_at(progress), self.p_at(progress, back=1)
        size = _total(v, lambda x: self._power(x, p))
        factor = self.factor
        if p != before and progress.step > 0:
            old, new = _total(v.detach(), lambda x: self._power(x, before)), size.detach()
            factor = factor * torch.where(new > 0, old / new, torch.ones_like(new))
            self._next = factor
        return factor * size

    def _power(self, v: Tensor, p: float) -> Tensor:
        epsilon: float = self.cfg.epsilon
        power: Tensor = (v + epsilon).pow(p) - epsilon**p
        return power

    @torch.no_grad()
    def settle(self) -> None:
        if self._next is not None:
            self.factor.copy_(self._next)
            self._next = None


def _sizes(codes: Codes, norms_F: Tensor | None) -> Tensor:
    """v = f n: (..., F), or (..., K) of sparse codes; float32 at least."""
    values = codes.values if isinstance(codes, SparseCodes) else codes
    v = values.to(torch.promote_types(values.dtype, torch.float32))
    if norms_F is None:
        return v
    return v * (norms_F[codes.indices] if isinstance(codes, SparseCodes) else norms_F)


def _total(v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """mean_n Σ_i function(v), for functions that are 0 at 0."""
    return function(v).sum(-1).mean()


def _mean_by_latent(codes: Codes, per_slot: Tensor) -> Tensor:
    """(F,) mean over tokens."""
    tokens = per_slot.shape[:-1].numel()
    if not isinstance(codes, SparseCodes):
        return per_slot.reshape(-1, per_slot.shape[-1]).sum(0) / tokens
    sums = per_slot.new_zeros(codes.n_latents)
    return sums.index_add(0, codes.indices.reshape(-1), per_slot.reshape(-1)) / tokens


@dataclass(frozen=True)
class _Row:
    config: type[PenaltyConfig]
    module: type[Penalty]


PENALTIES: dict[str, _Row] = {
    "l1": _Row(L1Config, L1),
    "tanh": _Row(TanhConfig, Tanh),
    "tanh_quad": _Row(TanhQuadConfig, TanhQuad),
    "l0": _Row(L0Config, L0),
    "lp": _Row(LpConfig, Lp),
}


def make_penalty(cfg: PenaltyConfig, activation: Activation) -> Penalty:
    """The module for a config. ConfigError if the two parts do not go together."""
    row = next(row for row in PENALTIES.values() if row.config is type(cfg))
    return row.module(cfg, activation)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"sae.penalty.{name}: expected more than 0, got {value}")
