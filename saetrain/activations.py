"""Activations as parts: pre-activations in, latents out. Any architecture takes any of them.

relu       dense; sparsity comes from a penalty.
topk       the k largest per token (Gao et al. 2024, arXiv 2406.04093). Sparse codes, L0 = k.
batchtopk  the k·N largest of the N tokens of a batch (Bussmann et al. 2024, arXiv 2412.06410): L0
           is k on average and tokens share the budget. One token must not depend on the others
           later, so inference keeps what is above a threshold: a moving average of the smallest
           kept value, biased low by being a minimum, until `calibrate` has counted held-out rows.
jumprelu   h where h > θ, θ learned per latent by straight-through gradients (Rajamanoharan et al.
           2024, arXiv 2407.14435). θ itself is the parameter, kept at 0 or more after each step:
           log θ under Adam moves by θ·lr a step, which is to say hardly. The bandwidth ε has the
           units of the latents: 0.001 belongs to inputs of length 1, not √d.
groupmax   the largest of each of k groups of F/k latents: no sort, cheaper than topk, but two
           latents of one group never fire together.

`select` is the training form, `infer` the one that is saved; they differ for batchtopk only. Adding
one: a config, a module, a row in ACTIVATIONS.

Shapes: ... leading dimensions, F latents, K active slots.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from saetrain.codes import Codes, SparseCodes, groupmax_codes, jumprelu_codes, topk_codes
from saetrain.errors import ConfigError
from saetrain.straight_through import KERNELS, REACH, Jump, Kernel, Step

InferenceName = Literal["relu", "topk", "jumprelu", "groupmax"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """The function that inference applies to pre-activations, with what it needs."""

    activation: InferenceName
    k: int | None = None  # topk, groupmax
    threshold: Tensor | None = None  # (F,) jumprelu

    def __call__(self, h: Tensor) -> Codes:
        """Latents of pre-activations h (..., F)."""
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return jumprelu_codes(h, self.threshold)
        if self.activation == "relu":
            return h.relu()
        assert self.k is not None
        return topk_codes(h, self.k) if self.activation == "topk" else groupmax_codes(h, self.k)


# -- settings --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Base of the settings under `sae.activation`."""

    def check(self, n_latents: int, because: str = "") -> None:
        """ConfigError if it cannot work with so many latents; `because` says where F is from."""


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(ActivationConfig):
    name: Literal["relu"] = "relu"


@dataclass(frozen=True, kw_only=True)
class TopKConfig(ActivationConfig):
    name: Literal["topk"] = "topk"
    k: int  # latents that fire per token

    def __post_init__(self) -> None:
        _at_least("sae.k", self.k, 1)

    def check(self, n_latents: int, because: str = "") -> None:
        _within(self.k, n_latents, because)


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(ActivationConfig):
    name: Literal["batchtopk"] = "batchtopk"
    k: float  # latents that fire per token, on average; need not be whole
    threshold_decay: float = 0.99  # of the moving average of the inference threshold
    calibrate_tokens: int = 100_000  # held-out rows that fix the threshold at the end; 0: none

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ConfigError(f"sae.k: expected more than 0, got {self.k}")
        if not 0 <= self.threshold_decay < 1:
            raise ConfigError(
                f"sae.activation.threshold_decay: expected 0 to below 1, got {self.threshold_decay}"
            )
        _at_least("sae.activation.calibrate_tokens", self.calibrate_tokens, 0)

    def check(self, n_latents: int, because: str = "") -> None:
        _within(self.k, n_latents, because)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(ActivationConfig):
    name: Literal["jumprelu"] = "jumprelu"
    threshold: float = 0.001  # θ at the start
    bandwidth: float = 0.001  # ε of the straight-through gradients
    kernel: Kernel = "rectangle"
    ste_to_input: bool = False  # also to the pre-activations, not to θ alone (Anthropic, 2025)

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(f"sae.activation.threshold: expected 0 or more, got {self.threshold}")
        if not self.bandwidth > 0:
            raise ConfigError(
                f"sae.activation.bandwidth: expected more than 0, got {self.bandwidth}"
            )


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig(ActivationConfig):
    name: Literal["groupmax"] = "groupmax"
    k: int  # groups, of which the largest latent fires

    def __post_init__(self) -> None:
        _at_least("sae.k", self.k, 1)

    def check(self, n_latents: int, because: str = "") -> None:
        _within(self.k, n_latents, because)
        if n_latents % self.k:
            raise ConfigError(
                f"sae.k={self.k} does not divide sae.n_latents={n_latents}{because}: groupmax "
                "needs k groups of equal size"
            )


# -- modules ---------------------------------------------------------------------------------------


class Activation(nn.Module, ABC):
    """What happens between pre-activations and latents, with the parameters it owns."""

    sparse: ClassVar[bool] = False  # whether codes are SparseCodes

    def __init__(self, cfg: Any, n_latents: int) -> None:
        super().__init__()
        self.cfg, self.n_latents = cfg, n_latents

    @abstractmethod
    def select(self, h: Tensor) -> Codes:
        """Training form: latents of pre-activations h (..., F), differentiable."""

    @abstractmethod
    def form(self) -> Form:
        """The inference form as of now."""

    def floor(self) -> Tensor | None:
        """(F,) such that h at most so large has value 0 and no gradient; None: there is none.

        Where it exists, so does `at`.
        """
        return None

    def at(self, h: Tensor, indices: Tensor) -> Tensor:
        """`select` of some pre-activations alone, those of the latents `indices`, same shape."""
        raise NotImplementedError

    def infer(self, h: Tensor) -> Codes:
        """Inference form: each token by itself."""
        return self.form()(h)

    def observe(self, codes: Codes) -> None:
        """Called once per training step with its codes."""

    def project(self) -> None:
        """Called after the optimizer step: bring parameters back to where they make sense."""

    def calibrator(self) -> Calibrator | None:
        """Something that wants held-out pre-activations after training, or None."""
        return None


class ReLU(Activation):
    def __init__(self, cfg: ReLUConfig, n_latents: int) -> None:
        super().__init__(cfg, n_latents)
        self.register_buffer("_floor", torch.zeros(n_latents), persistent=False)

    _floor: Tensor  # (F,)

    def select(self, h: Tensor) -> Tensor:
        return h.relu()

    def floor(self) -> Tensor:
        return self._floor

    def at(self, h: Tensor, indices: Tensor) -> Tensor:
        return h.relu()

    def form(self) -> Form:
        return Form(activation="relu")


class TopK(Activation):
    sparse = True

    def select(self, h: Tensor) -> SparseCodes:
        return topk_codes(h, self.cfg.k)

    def form(self) -> Form:
        return Form(activation="topk", k=self.cfg.k)


class GroupMax(Activation):
    sparse = True

    def select(self, h: Tensor) -> SparseCodes:
        return groupmax_codes(h, self.cfg.k)

    def form(self) -> Form:
        return Form(activation="groupmax", k=self.cfg.k)


class BatchTopK(Activation):
    """Dense codes of which k·N are kept; inference is a JumpReLU with one threshold for all.

    Before the first training step the threshold is 0: every positive latent fires.
    """

    threshold: Tensor  # () float32
    observed: Tensor  # () int64, steps that went into the average

    def __init__(self, cfg: BatchTopKConfig, n_latents: int) -> None:
        super().__init__(cfg, n_latents)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))

    def select(self, h: Tensor) -> Tensor:
        f = h.relu()
        keep = self.keep(f.shape[:-1].numel())
        chosen = f.detach().reshape(-1).topk(keep, sorted=False).indices
        mask = torch.zeros(f.numel(), dtype=torch.bool, device=f.device)
        mask[chosen] = True
        return f * mask.reshape(f.shape)

    def form(self) -> Form:
        return Form(activation="jumprelu", threshold=self.threshold.expand(self.n_latents).clone())

    def keep(self, tokens: int) -> int:
        """How many latents fire in a batch of so many tokens."""
        wanted: int = round(self.cfg.k * tokens)
        return min(max(1, wanted), tokens * self.n_latents)

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        """Average the smallest kept value in; a batch in which nothing fired leaves it alone."""
        f = (codes.values if isinstance(codes, SparseCodes) else codes).to(torch.float32)
        least = f.masked_fill(f <= 0, math.inf).amin()
        decay = torch.where(self.observed == 0, 0.0, self.cfg.threshold_decay)
        moved = torch.where(least.isfinite(), self.threshold.lerp(least, 1 - decay), self.threshold)
        self.threshold.copy_(moved)
        self.observed += least.isfinite()

    def calibrator(self) -> Calibrator | None:
        tokens = self.cfg.calibrate_tokens
        return Calibrator(self.cfg.k, tokens, self.threshold) if tokens else None


class JumpReLU(Activation):
    """h where h > θ; `count` is the differentiable L0."""

    def __init__(self, cfg: JumpReLUConfig, n_latents: int) -> None:
        super().__init__(cfg, n_latents)
        self.threshold = nn.Parameter(torch.full((n_latents,), cfg.threshold))

    def select(self, h: Tensor) -> Tensor:
        return self._jump(h, self.threshold)

    def _jump(self, h: Tensor, threshold: Tensor) -> Tensor:
        out: Tensor = Jump.apply(h, threshold, self._kernel, self.cfg.ste_to_input)  # type: ignore[no-untyped-call]
        return out

    def count(self, h: Tensor, indices: Tensor | None = None) -> Tensor:
        """Number of latents above their thresholds, (...,): the L0 of arXiv 2407.14435, eq. 9.

        h (..., F), or some of it: (..., K) of the latents `indices`.
        """
        theta = self.threshold if indices is None else self._thresholds(indices)
        steps: Tensor = Step.apply(h, theta, self._kernel, self.cfg.ste_to_input)  # type: ignore[no-untyped-call]
        return steps.sum(-1)

    @torch.no_grad()
    def floor(self) -> Tensor | None:
        """θ less the reach of the kernel, and a little for rounding; None for the gaussian's."""
        reach = REACH[self.cfg.kernel] * self.cfg.bandwidth
        if math.isinf(reach):
            return None
        floor_F: Tensor = self.threshold - (1.001 * reach + 1e-6 * self.threshold.abs())
        return floor_F

    def at(self, h: Tensor, indices: Tensor) -> Tensor:
        return self._jump(h, self._thresholds(indices))

    def _thresholds(self, indices: Tensor) -> Tensor:
        return self.threshold.gather(0, indices.reshape(-1)).reshape(indices.shape)

    def _kernel(self, h: Tensor, threshold: Tensor) -> Tensor:
        """K((h - θ) / ε) / ε."""
        u = (h.to(threshold.dtype) - threshold) / self.cfg.bandwidth
        density = KERNELS[self.cfg.kernel](u)
        return density.div_(float(self.cfg.bandwidth))

    def form(self) -> Form:
        return Form(activation="jumprelu", threshold=self.threshold)

    @torch.no_grad()
    def project(self) -> None:
        self.threshold.clamp_(min=0)


def fired(activation: Activation, pre: SparseCodes) -> tuple[SparseCodes, Tensor]:
    """Codes of pre-activations above the floor; and these without the padding, (N,)."""
    assert pre.used is not None
    h_N, indices_N = pre.values.masked_select(pre.used), pre.indices.masked_select(pre.used)
    values_N = activation.at(h_N, indices_N)
    values = torch.zeros_like(pre.values).masked_scatter(pre.used, values_N)
    return replace(pre, values=values), h_N


class Calibrator:
    """Finds the threshold above which k latents per token fire, on average over held-out rows.

    Counts positive pre-activations by the upper 20 bits after the sign of their float32 form
    (monotone in the value), so it needs one pass and 8 MB, whatever the number of rows; the
    threshold is exact to one part in 4,096. Bias: the rows it sees are the ones evaluated later.
    """

    SHIFT = 11  # of 31 bits after the sign, 20 stay: exponent and 12 bits of the mantissa

    def __init__(self, k: float, tokens: int, threshold: Tensor) -> None:
        self.k, self.wanted, self.seen = k, tokens, 0
        self.threshold = threshold
        bins = (1 << (31 - self.SHIFT)) + 1
        self.counts = torch.zeros(bins, dtype=torch.int64, device=threshold.device)

    def update(self, h: Tensor) -> bool:
        """Count the pre-activations of one batch, h (..., F); False once it has seen enough."""
        h = h.reshape(-1, h.shape[-1])[: self.wanted - self.seen]
        bits = h[h > 0].to(torch.float32).view(torch.int32) >> self.SHIFT
        self.counts += torch.bincount(bits, minlength=len(self.counts))
        self.seen += len(h)
        return self.seen < self.wanted

    def finish(self) -> None:
        """Write the threshold; with no rows it stays as it is."""
        if not self.seen:
            return
        above = self.counts.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
        edge = int((above - self.k * self.seen).abs().argmin())
        low = torch.tensor(edge << self.SHIFT, dtype=torch.int32).view(torch.float32)
        self.threshold.copy_(torch.nextafter(low, torch.zeros(())) if edge else low)


@dataclass(frozen=True)
class _Row:
    config: type[ActivationConfig]
    module: type[Activation] = field(repr=False)


ACTIVATIONS: dict[str, _Row] = {
    "relu": _Row(ReLUConfig, ReLU),
    "topk": _Row(TopKConfig, TopK),
    "batchtopk": _Row(BatchTopKConfig, BatchTopK),
    "jumprelu": _Row(JumpReLUConfig, JumpReLU),
    "groupmax": _Row(GroupMaxConfig, GroupMax),
}


def make_activation(cfg: ActivationConfig, n_latents: int) -> Activation:
    """The module for a config. ConfigError if it cannot work with `n_latents`."""
    cfg.check(n_latents)
    return next(row.module for row in ACTIVATIONS.values() if row.config is type(cfg))(
        cfg, n_latents
    )


def _at_least(word: str, value: float, least: int) -> None:
    if not value >= least:
        raise ConfigError(f"{word}: expected at least {least}, got {value}")


def _within(k: float, n_latents: int, because: str) -> None:
    if k > n_latents:
        raise ConfigError(f"sae.k={k:g} is larger than sae.n_latents={n_latents}{because}")
