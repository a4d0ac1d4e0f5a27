"""The optimizer of one SAE: named parameter groups, the learning rate as a closed form of the step,
an average of the weights when asked, and state as tensors. The rules are in optimizers.py.

The rate is computed, never accumulated, so a resumed run needs no scheduler state. Adam is the
fused one: a single elementwise pass over each tensor, so its bits do not depend on the number of
threads or on the grouping.

Schedule, for step t = 0 .. T-1, W warm-up and C decay steps:
lr(t) = lr * min(1, (t + 1) / W) * min(1, (T - t) / C).
Average (`ema_decay`), after n steps: a <- a + (1 - d) (w - a), d = min(ema_decay, n / (n + 9)), so
that the first steps do not linger. Cost: one more tensor per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from saetrain import optimizers
from saetrain.errors import ConfigError, TrainingError
from saetrain.kernels.latents import may_count
from saetrain.optim_settings import OptimSettings, ScheduleSettings
from saetrain.sums import length

THRESHOLDS = "*threshold"  # the parameters that `jumprelu_lr_factor` is for


def base_lr(settings: OptimSettings, n_latents: int, n_steps: int | None = None) -> float:
    """`optim.lr`, or base / sqrt(F / 2^14) times what a short run adds; None: a long run.

    1/sqrt(F) is of Gao et al. (arXiv 2406.04093), the bases are in optimizers.py. A run of
    T < 2^15 steps has too few for that rate: rules that take steps as Adam does get
    sqrt(2^15 / T) times as much, but no more than 1e-2 by it. Found at 60 to 2,340 steps and 512 to
    8,192 latents, docs/quality.md; the best rate fell like 1/sqrt(T) and like 1/sqrt(F).
    """
    if settings.lr is not None:
        return settings.lr
    free = settings.name == "schedulefree"
    base = optimizers.SCHEDULE_FREE_LR[settings.rule] if free else None
    rate = (base or optimizers.BASE_LR[settings.name]) / math.sqrt(n_latents / 2**14)
    if n_steps is None or settings.name not in optimizers.FASTER_WHEN_SHORT:
        return rate
    short = rate * math.sqrt(max(1.0, optimizers.LONG_RUN / max(1, n_steps)))
    return max(rate, min(short, optimizers.SHORT_RUN_LR))


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
    """Steps the parameters of one SAE, in groups that differ in their learning-rate factor."""

    def __init__(
        self,
        module: nn.Module,
        settings: OptimSettings,
        n_latents: int,
        n_steps: int | None = None,
    ) -> None:
        """`n_latents` and the `n_steps` of the run (None: many) decide a rate that is not given."""
        self.lr = base_lr(settings, n_latents, n_steps)
        self.settings, self.clip_norm = settings, settings.clip_norm
        self.module = module
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        groups = _groups(self.named, _factors(settings))
        self.groups = {label: tuple(names) for label, _, names in groups}
        made = [{"params": [self.named[n] for n in ns], "factor": f} for _, f, ns in groups]
        self.parts = optimizers.make(made, settings)
        self._ema: dict[str, Tensor] = {}
        self._n_averaged = 0

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the gradient to at most `clip_norm`; its norm before that, () on the device.

        As torch's clip_grad_norm_, but the same for any number of threads.
        """
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        if not grads:
            return torch.tensor(0.0)
        norm = length(torch.stack([length(g) for g in grads]))
        if self.clip_norm is not None:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            if may_count(factor) and factor == 1:  # where asking costs less than a pass over all
                return norm
            for grad in grads:
                grad.mul_(factor)
        return norm

    def step(self, factor: float) -> None:
        """One step at rate lr * factor (* the group's own factor), then drop gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor * group["factor"]
            part.step()
            part.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forget(self, replaced: Mapping[str, tuple[Any, ...]]) -> None:
        """Drop the history of entries that got new values, given as parameter name -> index:
        moments become 0, averages the new value."""
        for name, index in replaced.items():
            p = self.named[name]
            state = self._state(name)
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.shape != p.shape:  # such as step counts
                    continue
                if key == "z":
                    value[index] = p[index]
                elif value.dtype == torch.uint8:  # bitsandbytes: the code that stands for 0
                    value[index] = int(state[key.replace("state", "qmap")].abs().argmin())
                else:
                    value[index] = 0
            if name in self._ema:
                self._ema[name][index] = p[index]

    @torch.no_grad()
    def average(self) -> None:
        """Take the weights as they now are into the average; nothing without `ema_decay`."""
        if self.settings.ema_decay is None:
            return
        n, self._n_averaged = self._n_averaged, self._n_averaged + 1
        decay = min(self.settings.ema_decay, n / (n + 9))
        for name, p in self.named.items():
            self._ema.setdefault(name, p.detach().clone()).lerp_(p, 1 - decay)

    def averages(self) -> dict[str, Tensor]:
        """Weights to evaluate instead of the trained ones, by name; {} where there are none."""
        if self.settings.name != "schedulefree":
            return self._ema
        names = {p: n for n, p in self.named.items()}
        found = {
            names[p]: x
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
            if (x := optimizers.averaged(part, group, p)) is not None
        }
        return found

    @contextmanager
    def averaged(self, settle: Callable[[], None]) -> Iterator[None]:
        """Inside, the module holds the averages, if there are any; after it, what it held before.

        `settle` restores what an average of allowed weights may break, such as rows of length 1.
        """
        averages = self.averages()
        if not averages:
            yield
            return
        before = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        try:
            with torch.no_grad():
                for name, value in averages.items():
                    self.named[name].copy_(value)
                settle()
            yield
        finally:
            self.module.load_state_dict(before)

    def _state(self, name: str) -> dict[str, Any]:
        """What the rule keeps of one parameter; {} before its first step."""
        p = self.named[name]
        return next((part.state[p] for part in self.parts if p in part.state), {})

    def _numbers(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """(key in a checkpoint, group, key in the group) of numbers that change with the steps."""
        for i, part in enumerate(self.parts):
            for j, group in enumerate(part.param_groups):
                for key in optimizers.GROUP_STATE:
                    if key in group:
                        yield f"#{i}.{j}/{key}", group, key

    def tensors(self) -> dict[str, Tensor]:
        """State as `parameter/key` -> tensor, for safetensors."""
        found = {
            f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name in self.named
            for key, value in self._state(name).items()
        }
        if found:
            for full, group, key in self._numbers():
                found[full] = torch.tensor(group[key], dtype=torch.float64)
        for name, value in self._ema.items():
            found[f"{name}/ema"] = value
        if self._ema:
            found["#ema/n"] = torch.tensor(self._n_averaged)
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `tensors()`. TrainingError if the parameters are not the ones it was made of."""
        foreign = {key.rsplit("/", 1)[0] for key in tensors if key[0] != "#"} - set(self.named)
        if foreign:
            raise TrainingError(
                f"the checkpoint's optimizer has state of {sorted(foreign)}, which is no parameter "
                f"of this SAE; it has {sorted(self.named)}"
            )
        for name, p in self.named.items():
            state = dict(_of(tensors, name, p))
            if "ema" in state:
                self._ema[name] = state.pop("ema")
            if state:  # none for a parameter that never had a gradient
                if self.settings.name == "adam8bit":
                    state = {k: v.contiguous() for k, v in state.items()}  # it is read flat
                    state["step"] = int(state["step"])
                self._part_of(p).state[p] = state
        for full, group, key in self._numbers():
            if full in tensors:
                group[key] = type(group[key])(tensors[full].item())
        self._n_averaged = int(tensors.get("#ema/n", torch.tensor(0)))

    def _part_of(self, p: Tensor) -> torch.optim.Optimizer:
        """The optimizer that steps parameter `p`."""
        owned = ((part, q) for part in self.parts for g in part.param_groups for q in g["params"])
        return next(part for part, q in owned if q is p)


def _factors(settings: OptimSettings) -> dict[str, float]:
    """`lr_factors`, and `jumprelu_lr_factor` for parameters that they do not name."""
    own = settings.jumprelu_lr_factor
    return settings.lr_factors | ({} if own is None else {THRESHOLDS: own})


def _of(tensors: Mapping[str, Tensor], name: str, p: Tensor) -> Iterator[tuple[str, Any]]:
    for full, value in tensors.items():
        owner, key = full.rsplit("/", 1)
        if owner == name:
            if value.shape == p.shape:  # in the layout of p: fused Adam reads both as they lie
                own = torch.empty_like(p, dtype=value.dtype, memory_format=torch.preserve_format)
                yield key, own.detach().copy_(value)
            else:
                yield key, value.to(p.device, copy=True)


def _groups(
    named: Mapping[str, Tensor], factors: Mapping[str, float]
) -> list[tuple[str, float, list[str]]]:
    """(label, factor, parameter names); the first matching pattern wins, the rest is 'default'."""
    taken: dict[str, str] = {}
    for pattern, factor in factors.items():
        hits = [n for n in named if fnmatchcase(n, pattern)]
        if not hits or not factor > 0:
            thresholds = pattern == THRESHOLDS
            typed = "jumprelu_lr_factor" if thresholds else f"lr_factors.{pattern}"
            raise ConfigError(
                f"optim.{typed}={factor}: expected a factor above 0 for one of the "
                f"parameters {', '.join(named)}"
            )
        for name in hits:
            taken.setdefault(name, pattern)
    rest = [n for n in named if n not in taken]
    groups = [("default", 1.0, rest)] if rest else []
    for pattern, factor in factors.items():
        groups.append((pattern, factor, [n for n in named if taken.get(n) == pattern]))
    return [g for g in groups if g[2]]
