"""Adam with named parameter groups, and the learning rate as a closed form of the step.

The rate is computed, never accumulated, so a resumed run needs no scheduler state. Adam is the
fused one: a single elementwise pass over each tensor, so its bits do not depend on the number of
threads or on the grouping. Cost: two moments per parameter.

Schedule, for step t = 0 .. T-1, W warm-up and C decay steps:
lr(t) = lr * min(1, (t + 1) / W) * min(1, (T - t) / C).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from saetrain.errors import ConfigError, TrainingError
from saetrain.settings import OptimSettings, ScheduleSettings


def base_lr(settings: OptimSettings, n_latents: int) -> float:
    """`optim.lr`, or 2e-4 / sqrt(F / 2^14): 1/sqrt(F) scaling of Gao et al. (arXiv 2406.04093)."""
    return settings.lr if settings.lr is not None else 2e-4 / math.sqrt(n_latents / 2**14)


def schedule_factor(step: int, n_steps: int, settings: ScheduleSettings) -> float:
    """Factor on the learning rate at 0-based `step`, in (0, 1]."""
    warmup = settings.warmup_steps
    if warmup is None:
        fraction = settings.warmup_fraction
        warmup = round(n_steps * (0.05 if fraction is None else fraction))
    decay = round(n_steps * settings.decay_fraction)
    up = (step + 1) / warmup if warmup else 1.0
    down = (n_steps - step) / decay if decay else 1.0
    return min(1.0, up) * min(1.0, down)


class Optimizer:
    """Adam over the parameters of one SAE, in groups that differ in their learning-rate factor."""

    def __init__(self, module: nn.Module, settings: OptimSettings, n_latents: int) -> None:
        self.lr = base_lr(settings, n_latents)
        self.clip_norm = settings.clip_norm
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        groups = _groups(self.named, settings.lr_factors)
        self.factors = [factor for _, factor, _ in groups]
        self.adam = torch.optim.Adam(
            [{"params": [self.named[n] for n in names]} for _, _, names in groups],
            lr=self.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self.groups = {label: tuple(names) for label, _, names in groups}

    def clip(self) -> Tensor:
        """Scale the gradient to at most `clip_norm`; its norm before that, () on the device."""
        limit = math.inf if self.clip_norm is None else self.clip_norm
        return nn.utils.clip_grad_norm_(self.named.values(), limit, foreach=False)

    def step(self, factor: float) -> None:
        """One Adam step at rate lr * factor (* the group's own factor), then drop gradients."""
        for group, own in zip(self.adam.param_groups, self.factors, strict=True):
            group["lr"] = self.lr * factor * own
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def forget(self, replaced: Mapping[str, tuple[Any, ...]]) -> None:
        """Zero the moments of entries that got new values, given as parameter name -> index."""
        for name, index in replaced.items():
            for value in self.adam.state.get(self.named[name], {}).values():
                if value.shape == self.named[name].shape:  # not the step count
                    value[index] = 0

    def tensors(self) -> dict[str, Tensor]:
        """State as `parameter/key` -> tensor, for safetensors."""
        state = self.adam.state
        return {
            f"{name}/{key}": value
            for name, p in self.named.items()
            for key, value in state.get(p, {}).items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `tensors()`. TrainingError if the parameters are not the ones it was made of."""
        foreign = {key.rsplit("/", 1)[0] for key in tensors} - set(self.named)
        if foreign:
            raise TrainingError(
                f"the checkpoint's optimizer has state of {sorted(foreign)}, which is no parameter "
                f"of this SAE; it has {sorted(self.named)}"
            )
        for name, p in self.named.items():
            state = dict(_of(tensors, name, p))
            if state:  # none for a parameter that never had a gradient
                self.adam.state[p] = state


def _of(tensors: Mapping[str, Tensor], name: str, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    for full, value in tensors.items():
        owner, key = full.rsplit("/", 1)
        if owner == name:
            yield key, value.to(p.device, copy=True)


def _groups(
    named: Mapping[str, Tensor], factors: Mapping[str, float]
) -> list[tuple[str, float, list[str]]]:
    """(label, factor, parameter names); the first matching pattern wins, the rest is 'default'."""
    taken: dict[str, str] = {}
    for pattern, factor in factors.items():
        hits = [n for n in named if fnmatchcase(n, pattern)]
        if not hits or not factor > 0:
            raise ConfigError(
                f"optim.lr_factors.{pattern}={factor}: expected a factor above 0 for one of the "
                f"parameters {', '.join(named)}"
            )
        for name in hits:
            taken.setdefault(name, pattern)
    rest = [n for n in named if n not in taken]
    groups = [("default", 1.0, rest)] if rest else []
    for pattern, factor in factors.items():
        groups.append((pattern, factor, [n for n in named if taken.get(n) == pattern]))
    return [g for g in groups if g[2]]
