"""Settings of the optimizer and of the learning rate's schedule; the rules are in optimizers.py.

One class for all rules keeps `optim.lr=…` the same sweep for each of them. A field that the chosen
rule does not read must stay at its default: a value that has no effect is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from saetrain.errors import ConfigError

Name = Literal["adam", "adamw", "signum", "schedulefree", "muon", "adam8bit"]

# Which of the fields below a rule reads, beside lr, clip_norm, lr_factors and ema_decay.
READS: dict[str, tuple[str, ...]] = {
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps", "weight_decay"),
    "signum": ("momentum", "weight_decay"),
    "schedulefree": ("rule", "betas", "eps", "momentum", "weight_decay"),
    "muon": ("betas", "eps", "momentum", "weight_decay"),
    "adam8bit": ("betas", "eps"),
}
_OWN = ("betas", "eps", "momentum", "weight_decay", "rule")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The rule and its numbers; `lr=None` follows from latents F and steps T: `optim.base_lr`.

    Raises ConfigError for values out of range and for ones that the rule would not read.
    """

    name: Name = "adam"
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.95  # of signum and muon; of schedulefree with rule=sign
    weight_decay: float = 0.0  # decoupled, times the rate
    rule: Literal["adam", "sign"] = "adam"  # that schedulefree averages
    clip_norm: float | None = 1.0  # of the whole gradient; None: no clipping
    lr_factors: dict[str, float] = field(default_factory=dict)  # parameter name or glob -> factor
    jumprelu_lr_factor: float | None = None  # of the thresholds; None: 1
    ema_decay: float | None = None  # save and evaluate an average of the weights; None: the last

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas: expected two numbers in [0, 1), got {self.betas}")
        for name in ("lr", "eps", "clip_norm", "jumprelu_lr_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"optim.{name}: expected more than 0, got {value}")
        for name in ("momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"optim.{name}: expected between 0 and 1, got {value}")
        if not self.weight_decay >= 0:
            raise ConfigError(f"optim.weight_decay: expected 0 or more, got {self.weight_decay}")
        self._check_read()

    def _check_read(self) -> None:
        read = READS[self.name]
        if self.name == "schedulefree":
            kept = ("momentum",) if self.rule == "sign" else ("betas", "eps")
            read = ("rule", "weight_decay", *kept)
            if self.ema_decay is not None:
                raise ConfigError(
                    "optim.ema_decay and optim.name=schedulefree both average the weights; give one"
                )
            if self.rule == "adam" and self.betas[0] == 0:
                raise ConfigError("optim.betas: schedulefree averages with the first one, give > 0")
        defaults = {f.name: f.default for f in fields(self)}
        for name in _OWN:
            if name not in read and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"optim.{name}={getattr(self, name)} has no effect: optim.name={self.name} "
                    f"reads {', '.join(('lr', *read))}"
                )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Linear warm-up from 0 and linear decay to 0; 5 % and 20 % of the steps by default."""

    name: Literal["linear"] = "linear"
    warmup_fraction: float | None = None  # of all steps
    warmup_steps: int | None = None  # instead of the fraction
    decay_fraction: float = 0.2  # of all steps, at the end

    def __post_init__(self) -> None:
        if self.warmup_fraction is not None and self.warmup_steps is not None:
            raise ConfigError(
                "schedule: give warmup_fraction or warmup_steps, not both, got "
                f"warmup_fraction={self.warmup_fraction} and warmup_steps={self.warmup_steps}"
            )
        for name in ("warmup_fraction", "decay_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"schedule.{name}: expected 0 to 1, got {value}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps: expected 0 or more, got {self.warmup_steps}")
