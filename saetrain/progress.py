"""Where training stands. Schedules inside an SAE depend on this and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step: 0-based `step` of `n_steps`."""

    step: int
    n_steps: int
    tokens: int  # trained on so far, this batch included

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / max(1, self.n_steps))
