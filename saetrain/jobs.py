"""Jobs of one command that train together: all of a fused sweep, or one with several hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from actcache.store.errors import ActcacheError
from saetrain import outcomes
from saetrain.errors import SaetrainError
from saetrain.expand import expand
from saetrain.outcomes import FAILED, Outcome
from saetrain.settings import TrainSettings
from saetrain.sweep import train_together


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job: its number in the sweep, what the user typed for it, how to get its settings."""

    number: int
    overrides: tuple[str, ...]
    settings: Callable[[], TrainSettings]


def train_jobs(tasks: Sequence[Task]) -> list[float]:
    """Train all in this process, one SAE a hook, and note every outcome.

    The score of each job: of several hooks the mean, `outcomes.FAILED` if any of them failed.
    """
    single: list[tuple[int, tuple[str, ...], TrainSettings]] = []
    scores: dict[int, list[float]] = {task.number: [] for task in tasks}
    for task in tasks:
        try:
            settings = task.settings()
            named = settings.several_hooks
            for one in expand(settings):
                words = (*task.overrides, f"hook={one.hook}") if named else task.overrides
                single.append((task.number, words, one))
        except (SaetrainError, ActcacheError) as e:
            print(f"error: {e}", file=sys.stderr)
            scores[task.number].append(FAILED)
            outcomes.note(Outcome(job=task.number, overrides=task.overrides, reason=str(e)))
    done = train_together([settings for _, _, settings in single])
    for (number, words, settings), outcome in zip(single, done, strict=True):
        if outcome.result is None:
            scores[number].append(FAILED)
            outcomes.note(Outcome(job=number, overrides=words, reason=outcome.reason))
            continue
        score = outcomes.score(outcome.result.metrics, settings.target_l0)
        scores[number].append(score)
        made = Outcome(
            job=number,
            overrides=words,
            run_dir=str(outcome.result.run_dir),
            score=score,
            target_l0=settings.target_l0,
        )
        outcomes.note(made)
    return [fmean(scores[task.number]) for task in tasks]
