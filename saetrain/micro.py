"""The gradient of one batch, whole or in equal pieces whose gradients add up.

Memory of size batch x latents falls by the number of pieces; a step costs the same work in smaller
products. Each term is a mean over tokens, so pieces are weighted by the tokens that count in them.

Bias: whatever looks at a whole batch looks at one piece. batchtopk keeps k tokens' worth per piece,
AuxK divides by the piece's variance, a target for L0 is compared piece by piece, and resampling
draws from the last one. All others give the full batch's weights up to rounding. The clock of dead
latents stands still until the step is done, as for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.progress import Progress
from saetrain.saes.base import SAE, Losses
from saetrain.units import MASK
from saetrain.window import step_numbers

Inputs = Mapping[str, Tensor]


def pieces(inputs: Inputs, n: int) -> Iterator[dict[str, Tensor]]:
    """`inputs` in n equal parts along the first dimension, as views.

    ConfigError if they cannot be equal.
    """
    rows = {v.shape[0] for v in inputs.values()}
    if len(rows) != 1 or (total := rows.pop()) % n:
        raise ConfigError(
            f"grad_acc_steps x micro_acc_steps = {n}: expected a divisor of the {total:,} rows or "
            "contexts of a batch"
        )
    size = total // n
    for i in range(n):
        yield {k: v[i * size : (i + 1) * size] for k, v in inputs.items()}


def backward(
    sae: SAE,
    losses_of: Callable[[Inputs, Progress], Losses],
    inputs: Inputs,
    progress: Progress,
    n: int,
) -> tuple[dict[str, Tensor], Inputs]:
    """Gradients of the batch into `.grad`, firing noted; its numbers and the last piece.

    The numbers are those of `step_numbers`, means over the batch, with grad_norm still 0.
    """
    if n == 1:
        losses = losses_of(inputs, progress)
        return _one(sae, losses, None), inputs
    clock = sae.tokens_since_fired
    start, running, fired = clock.clone(), clock.clone(), torch.zeros_like(clock, dtype=torch.bool)
    numbers: dict[str, Tensor] = {}
    piece: Inputs = inputs
    for piece in pieces(inputs, n):
        share = _share(piece, inputs, n)
        losses = losses_of(piece, progress)
        clock.copy_(running)
        found = _one(sae, losses, share)
        del losses  # the graph goes before the next one comes
        fired |= clock == 0
        running.copy_(clock)
        clock.copy_(start)
        for name, value in found.items():
            numbers[name] = numbers.get(name, 0) + value * share
    clock.copy_(running.masked_fill(fired, 0))
    return numbers, piece


def _one(sae: SAE, losses: Losses, share: Tensor | float | None) -> dict[str, Tensor]:
    """Backward of one piece, times its share of the batch."""
    total = losses.total
    (total if share is None else total * share).backward()  # type: ignore[no-untyped-call]
    sae.note_firing(losses.codes)
    return {k: v.detach() for k, v in step_numbers(losses, total, total.new_zeros(())).items()}


def _share(piece: Inputs, inputs: Inputs, n: int) -> Tensor | float:
    """The piece's part of the tokens that count."""
    if MASK not in inputs:
        return 1 / n
    return piece[MASK].sum() / inputs[MASK].sum().clamp(min=1)
