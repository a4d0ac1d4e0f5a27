"""One SAE of a group that trains in lockstep: what it needs of its own, and what became of it.

A job is a `Trainer` with its run folder, logs and random generators. Its steps may run in any
thread, beside those of others; logs, wandb and failures are for the thread that made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saetrain import checkpoint as ckpt
from saetrain import runs
from saetrain.evals.run import fit_baseline
from saetrain.log import Logger, say
from saetrain.runs import Source
from saetrain.settings import TrainSettings
from saetrain.stream import Batch
from saetrain.trainer import Trainer, TrainResult, complete, running


@dataclass(kw_only=True, eq=False)
class Job:
    """One SAE of a group, and what became of it."""

    settings: TrainSettings  # resolved
    source: Source
    record: dict[str, Any]  # of run.json
    result: TrainResult | None = None
    reason: str | None = None  # why it was dropped
    trainer: Trainer | None = None  # while it is alive

    def __post_init__(self) -> None:
        self._open, self._generators = ExitStack(), dict[str, Tensor]()
        self.logger: Logger | None = None
        self.place: dict[str, Any] = self.source.start  # of the stream, at the job's step
        self.first = 0  # steps done before this call
        self.took = 0.0  # seconds of the last turn
        self.metrics: dict[str, Any] | None = None  # of the evaluation at the end

    @property
    def hooks(self) -> tuple[str, ...]:
        """Input hooks first, in the order of the job's own stream."""
        return tuple(dict.fromkeys((*self.source.hooks_in, *self.source.hooks_out)))

    def start(self, device: torch.device, warn: Callable[[str], None]) -> None:
        """Make the SAE, claim the folder, continue from the newest checkpoint."""
        torch.manual_seed(self.settings.seed)
        trainer = Trainer(self.settings, self.source, device)
        self.record |= trainer.facts
        held = running(trainer, self.record, bar=False, warn=warn)
        self.logger = self._open.enter_context(held)
        self.trainer, self.first = trainer, trainer.step
        if trainer.step:
            self.place = self.source.train.state_dict()

    def fit_baseline(self) -> None:
        """What `measure` would do with the training stream."""
        trainer = self.alive()[0]
        fit_baseline(self.source, self.settings.eval, trainer.device)

    def measure(self) -> None:
        """Save and evaluate, without a bar; in any thread."""
        self.metrics = self.alive()[0].finish(self.record, progress=False)

    def finish(self) -> None:
        """Save and evaluate unless that is done, report, and let go of the memory."""
        trainer, logger = self.alive()
        metrics = complete(trainer, self.record, logger, self.metrics)
        self.result = TrainResult(
            run_dir=self.settings.run_dir,
            metrics=metrics,
            trained_steps=trainer.step - self.first,
        )
        self.close()

    def drop(self, reason: str, *, record: bool = True) -> None:
        """Let go of it; `record` keeps the reason in run.json, if the folder is this job's."""
        self.reason = reason
        say(f"dropped {self.settings.run_dir.name}: {reason}")
        file = self.settings.run_dir / runs.RUN
        if self.trainer is not None and runs.read_json(file).get("status") != "stopped":
            runs.write_json(file, {**self.record, "status": "failed", "reason": reason})
        self.close()

    def close(self) -> None:
        """Close logs and folder. The trainer is forgotten."""
        self._open.close()
        self.trainer = self.logger = None

    def alive(self) -> tuple[Trainer, Logger]:
        assert self.trainer is not None
        assert self.logger is not None
        return self.trainer, self.logger

    @property
    def until_due(self) -> int:
        """Steps from here to the next one after which `tell` or `save` has something to do."""
        trainer, cfg = self.alive()[0], self.settings
        every = cfg.log_every, cfg.eval.every_steps, cfg.checkpoint.every_steps
        return min(trainer.n_steps - trainer.step, *(e - trainer.step % e for e in every if e))

    @property
    def beside(self) -> bool:
        """Whether others may take a step meanwhile."""
        return not (self.settings.compile or self.alive()[0].sae.draws_random)

    def learn(self, batches: Sequence[Batch]) -> None:
        """A step on each; in any thread."""
        begun = time.perf_counter()
        for batch in batches:
            self.alive()[0].learn(_of_hooks(batch, self.hooks))
        self.took = time.perf_counter() - begun

    def tell(self) -> None:
        """What the steps came to."""
        trainer, logger = self.alive()
        trainer.tell(logger)

    def save(self) -> None:
        """A checkpoint, with the job's own generators; in any thread, outside of its turn."""
        self.alive()[0].save(self._generators)

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """The job's own random generators, for the time of its turn."""
        if self._generators:
            ckpt.load_rng(self._generators, device)
        yield
        self._generators = ckpt.rng_tensors(device)


def _of_hooks(batch: Batch, hooks: tuple[str, ...]) -> Batch:
    """The batch as a stream of these hooks alone gives it."""
    if tuple(batch.acts) == hooks:
        return batch
    return replace(batch, acts={h: batch.acts[h] for h in hooks})
