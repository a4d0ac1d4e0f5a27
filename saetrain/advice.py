"""What to say, before training, of settings that have no effect or do not go together.

The same words for runs of the same settings, so that a sweep can say them once.
"""

from __future__ import annotations

from collections.abc import Iterator

from saetrain.settings import FusedSettings, TrainSettings


def advice(settings: TrainSettings, dead_after_tokens: int, n_steps: int) -> Iterator[str]:
    """One sentence each. `dead_after_tokens` is that of the SAE."""
    total = n_steps * settings.batch_tokens
    if dead_after_tokens >= total:
        yield (
            f"sae.dead_after_tokens={dead_after_tokens:,} has no effect in a run of {total:,} "
            "tokens: no latent will count as dead during training"
        )
    decay = settings.schedule.decay_fraction
    if settings.optim.name == "schedulefree" and decay:
        yield (
            f"optim.name=schedulefree averages instead of decaying, and schedule.decay_fraction="
            f"{decay:g} lowers its rate all the same; schedule=constant is meant for it"
        )


def advice_alone(settings: TrainSettings) -> Iterator[str]:
    """What only a sweep with hydra/launcher=fused, or one SAE for each of several hooks, reads."""
    for name, value in vars(settings.fused).items():
        if value != getattr(FusedSettings(), name):
            yield f"fused.{name}={value} has no effect: this SAE is trained alone"
