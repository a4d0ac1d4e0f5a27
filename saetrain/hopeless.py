"""Early stopping of hopeless jobs: a sweep should not spend hours on a run that shows nothing.

The rule looks at rows of metrics.jsonl from step `at_step` on, so it costs nothing and cannot read
the future: a run that would have recovered later is lost (its checkpoint is kept: other limits
continue it). Which runs are stopped depends on the settings alone, not on time or on other runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saetrain.errors import ConfigError, TrainingError

STOPPED = "stopped"  # status in run.json
EARLY = "stopped early at step "  # what its reason begins with
REMEDY = "Other limits in early_stop continue it; fresh=true trains it again"


class HopelessRun(TrainingError):
    """A run was stopped by `early_stop`; the message says why."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopSettings:
    """Give up a run whose training rows fall short; nothing is stopped while `at_step` is None."""

    at_step: int | None = None  # from this step on
    min_fve: float | None = None  # stop below it
    max_dead: float = 1.0  # stop at this share of dead latents or more; 1: when all are dead

    def __post_init__(self) -> None:
        if self.at_step is not None and self.at_step < 1:
            raise ConfigError(f"early_stop.at_step: expected 1 or more, got {self.at_step}")
        if not 0 < self.max_dead <= 1:
            raise ConfigError(f"early_stop.max_dead: expected above 0, to 1, got {self.max_dead}")
        if self.at_step is None and (self.min_fve, self.max_dead) != (None, 1.0):
            raise ConfigError(
                "early_stop.min_fve and early_stop.max_dead have no effect without "
                "early_stop.at_step: from which step on?"
            )

    def reason(self, row: Mapping[str, Any]) -> str | None:
        """Why the run with this row of metrics should stop; None if it should not.

        ConfigError if `min_fve` is asked of an architecture whose rows have no fve.
        """
        if self.at_step is None or row["step"] < self.at_step:
            return None
        if self.min_fve is not None:
            if "fve" not in row:
                raise ConfigError(
                    "early_stop.min_fve: this architecture reports no fve while it trains; "
                    f"its rows have {', '.join(row)}"
                )
            if row["fve"] < self.min_fve:
                return f"fve {row['fve']:.4g} is below early_stop.min_fve={self.min_fve:g}"
        if row["dead"] >= self.max_dead:
            return f"{row['dead']:.1%} of the latents are dead (early_stop.max_dead)"
        return None


def record(rule: EarlyStopSettings, reason: str) -> dict[str, Any]:
    """What run.json says of a stopped run."""
    return {"status": STOPPED, "reason": reason, "early_stop": asdict(rule)}


def refuse_stopped(known: Mapping[str, Any], rule: EarlyStopSettings) -> None:
    """HopelessRun again, without a step, if run.json `known` is of a run that this rule stopped."""
    if known.get("status") == STOPPED and known.get("early_stop") == asdict(rule):
        raise HopelessRun(f"{known['reason']}. {REMEDY}")
