"""The numbers of the steps since the last metrics row, kept on the device until they are read.

One vector per step and one copy to the host per row, so logging never makes a GPU wait. The whole
window goes into checkpoints: a resumed run averages over the same steps as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saetrain.codes import l0
from saetrain.errors import TrainingError
from saetrain.saes.base import Losses


class Window:
    """Named scalars of consecutive steps."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._steps: list[Tensor] = []  # (M,) float32 each

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add one step. TrainingError if its names are not those of the steps before."""
        names = tuple(numbers)
        if self.names and names != self.names:
            raise TrainingError(
                f"losses() gave {', '.join(names)} at this step and {', '.join(self.names)} "
                "before; every step must give the same terms and extras"
            )
        self.names = names
        self._steps.append(torch.stack([v.detach().to(torch.float32) for v in numbers.values()]))

    def check(self, step: int) -> Tensor:
        """All values as (steps, M) float64 on the host; `step` is the number of the last step.

        TrainingError naming the first step with a number that is not finite, and its loss.
        """
        if not self._steps:
            return torch.zeros(0, len(self.names), dtype=torch.float64)
        values = torch.stack(self._steps).to("cpu", torch.float64)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            at = int(bad[0, 0])
            named = dict(zip(self.names, values[at].tolist(), strict=True))
            terms = ", ".join(
                f"{n}={v:.4g}" for n, v in named.items() if n == "loss" or not math.isfinite(v)
            )
            raise TrainingError(f"training diverged at step {step - len(self) + at + 1}: {terms}")
        return values

    def take(self, step: int) -> dict[str, float]:
        """Means over the window, which is emptied. Raises like `check`."""
        means = self.check(step).mean(0).tolist()
        self._steps = []
        return dict(zip(self.names, means, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; empty if the window is."""
        return {"window": torch.stack(self._steps)} if self._steps else {}

    def load(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Restore what `tensors` and `names` held."""
        self.names = tuple(names)
        self._steps = list(tensors["window"].to(device)) if "window" in tensors else []


def step_numbers(losses: Losses, total: Tensor, grad_norm: Tensor) -> dict[str, Tensor]:
    """What is logged of one step, scalars on the device."""
    return {
        "loss": total,
        **{f"loss/{name}": term for name, term in losses.terms.items()},
        **losses.extras,
        "l0": l0(losses.codes).to(torch.float32).mean(),
        "grad_norm": grad_norm,
    }
