"""Several SAEs trained on one stream: each batch is read once and goes to all of them in turn.

Every job is a `Trainer` of its own: optimizer, schedule, checkpoints, run folder, metrics, wandb
run. What a single run would share with nobody, torch's random generator, is swapped at each turn.
So on a CPU a job gives the weights and the metric rows of its single run, bit for bit. Jobs may
have different lengths, and stand at different steps after a kill: the stream starts where the
slowest one is, and the others join when it reaches them. A job that fails is dropped, its reason
in run.json; the others go on. Evaluation comes after all training: held-out batches are kept in
memory if they are few, and the PCA beside the SAEs is fitted once.

On a CPU several jobs take their step of a batch at once (`fused.workers`, `saetrain.workers`);
those that draw random numbers (`SAE.draws_random`) or are compiled go one after the other, with all
threads. Logs, wandb and failures are this thread's business.

Cost: weights and moments of all jobs in memory, gradients and activations of one a worker.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from actcache.store.errors import ActcacheError
from saetrain import checkpoint as ckpt
from saetrain import runs
from saetrain.errors import SaetrainError, TrainingError
from saetrain.evals.run import fit_baseline
from saetrain.hopeless import HopelessRun
from saetrain.interrupt import Interrupted, stop_flag
from saetrain.kept import Kept
from saetrain.log import Logger, say
from saetrain.runs import BatchStream, Source
from saetrain.settings import TrainSettings
from saetrain.stack import Stack
from saetrain.stream import Batch
from saetrain.stream.told import Told
from saetrain.trainer import Trainer, TrainResult, complete, running
from saetrain.workers import Workers, how_many

_DRAWN = (
    "its step went beside others, and one of them drew random numbers, although draws_random of "
    "its class is False. Correct that, or set fused.workers=1"
)


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
        self.took = 0.0  # seconds of the last step
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
    def beside(self) -> bool:
        """Whether others may take a step meanwhile."""
        return not (self.settings.compile or self.alive()[0].sae.draws_random)

    def learn(self, batch: Batch) -> None:
        """One step; in any thread."""
        begun = time.perf_counter()
        self.alive()[0].learn(_of_hooks(batch, self.hooks))
        self.took = time.perf_counter() - begun

    def tell(self) -> None:
        """What the step came to."""
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


class Lockstep:
    """Jobs on one stream. All must have the stream's batches as their own, see `saetrain.sweep`."""

    def __init__(self, jobs: Sequence[Job], stream: BatchStream, device: torch.device) -> None:
        """`stream` has the hooks of all jobs; it may be the `source.train` of some."""
        self.jobs, self.stream, self.device = list(jobs), stream, device
        self.workers = Workers(1)

    def run(self) -> None:
        """Train, then evaluate. Each job ends with a result or a reason; Interrupted on Ctrl-C."""
        try:
            said = set[str]()
            for job in self.jobs:
                self._attempt(job, partial(job.start, self.device, partial(_say_once, said)))
            self._begin()
            with self._many() as self.workers:
                try:
                    self._train()
                except (SaetrainError, ActcacheError) as e:  # of the stream: no job can go on
                    for job in self.living():
                        job.drop(str(e))
                self._finish()
        finally:
            for job in self.jobs:
                job.close()

    def _many(self) -> Workers:
        """As many as there are jobs for, or as asked for; says so."""
        living = self.living()
        asked = living[0].settings.fused.workers if living else None
        n_beside = sum(job.beside for job in living)
        if asked is not None and asked > 1 and (self.device.type != "cpu" or n_beside < 2):
            why = "no two runs can" if self.device.type == "cpu" else "steps of a GPU do not"
            say(f"fused.workers={asked} has no effect: {why} go side by side")
        workers = Workers(how_many(asked, n_beside, self.device))
        if workers.n > 1:
            inside = f"{workers.threads} thread{'s' * (workers.threads > 1)} in each"
            say(f"{workers.n} of {len(living)} runs step at once, {inside}")
        return workers

    def _finish(self) -> None:
        """Evaluate all jobs, those with the same held-out rows one after the other or at once."""
        by_source: dict[int, list[Job]] = {}
        for job in self.living():
            by_source.setdefault(id(job.source), []).append(job)
        for jobs in by_source.values():
            self._measure(jobs)
            for job in jobs:
                if job.trainer is not None:
                    self._attempt(job, job.finish)
            if isinstance(held_out := jobs[0].source.held_out, Kept):
                held_out.forget()

    def _measure(self, jobs: Sequence[Job]) -> None:
        """Evaluate jobs of one source at once, where that draws no numbers and rows are kept."""
        source = jobs[0].source
        beside = [j for j in jobs if j.beside and not j.settings.eval.metrics]
        if self.workers.n == 1 or len(beside) < 2 or not isinstance(source.held_out, Kept):
            return
        try:
            row_bytes = 4 * sum(space.d for space in source.spaces().values())
            if not source.held_out.keep_all(row_bytes):
                return
        except (SaetrainError, ActcacheError):  # met again by every job, as its own
            return
        for job in beside:
            self._attempt(job, job.fit_baseline)
        say(f"evaluating {len(beside)} runs, {self.workers.n} at once")
        self._at_once([j for j in beside if j.trainer], Job.measure)

    def living(self) -> list[Job]:
        """Jobs that have neither ended nor failed."""
        return [j for j in self.jobs if j.trainer is not None]

    def _attempt(self, job: Job, do: Callable[[], None]) -> None:
        """Let a job do something; drop it if it cannot."""
        try:
            with job.turn(self.device):
                do()
        except HopelessRun as e:  # it has said so in run.json
            job.drop(str(e), record=False)
        except (SaetrainError, ActcacheError) as e:
            job.drop(str(e))
        except Exception as e:  # noqa: BLE001  an architecture may raise anything; others go on
            traceback.print_exc()
            job.drop(f"{type(e).__name__}: {e}")

    def _begin(self) -> None:
        """Set the stream to where the slowest job stands; measure it once for all."""
        behind = [j for j in self.living() if j.alive()[0].step < j.alive()[0].n_steps]
        if not behind:
            return
        slowest = min(behind, key=lambda j: j.alive()[0].step)
        self.stream.load_state_dict(slowest.place)
        first: Told | None = None
        for job in behind:
            trainer = job.alive()[0]
            if first is None:
                trainer.told = first = Told(self.stream, say)
                trainer.begin()
            else:
                trainer.told = Told(self.stream, _nothing)
                trainer.begin(like=first)

    def _train(self) -> None:
        steps = {id(j): j.alive()[0].n_steps for j in self.living()}
        active = [j for j in self.living() if j.alive()[0].step < steps[id(j)]]
        if not active:
            return
        position = min(j.alive()[0].step for j in active)
        stack = self._stack(active)
        batches = cast(Any, iter(self.stream))
        with closing(batches), self._bar(active, position, steps) as bar, stop_flag() as stop:
            while active:
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                now = [j for j in active if j.alive()[0].step == position]
                # The first step may change weights before it encodes: not stacked.
                self._step(now, batch, waited, stack if position else None)
                position += 1
                bar.update()
                active = [j for j in active if j.trainer and position < steps[id(j)]]
                if stop.is_set():
                    raise self._interrupt(position)
        for job in self.living()[:1]:
            job.alive()[0].told.end()

    def _step(self, now: Sequence[Job], batch: Batch, waited: float, stack: Stack | None) -> None:
        """One batch through the jobs whose turn it is."""
        place = self.stream.state_dict()
        for train in {id(j.source.train): j.source.train for j in now}.values():
            if train is not self.stream:  # its state goes into checkpoints
                train.load_state_dict(place)
        if stack is not None:
            stack.encode([j.alive()[0].sae for j in now], batch)
        for job in now:
            job.alive()[0].waited(waited)
        beside = [j for j in now if self.workers.n > 1 and j.beside]
        self._at_once(beside, lambda j: j.learn(batch))
        for job in now:
            if job not in beside:
                self._attempt(job, lambda j=job: j.learn(batch))  # type: ignore[misc]
        for job in now:
            if job.trainer is not None:
                self._attempt(job, job.tell)
        self._at_once([j for j in now if j.trainer and j.trainer.save_due], Job.save)

    def _at_once(self, jobs: Sequence[Job], do: Callable[[Job], None]) -> None:
        """Let the workers do it for all jobs, the slowest one first; none may draw numbers."""
        if not jobs:
            return
        first = sorted(jobs, key=lambda j: -j.took)
        before = ckpt.rng_tensors(self.device)
        found = self.workers.each([partial(do, job) for job in first])
        drawn = not all(map(torch.equal, before.values(), ckpt.rng_tensors(self.device).values()))
        for job, error in zip(first, found, strict=True):
            if error is None and drawn:
                error = TrainingError(_DRAWN)
            if error is not None:
                self._attempt(job, partial(_raise, error))

    def _stack(self, jobs: Sequence[Job]) -> Stack:
        wanted = [j for j in jobs if j.settings.fused.stack]
        stack = Stack([j.alive()[0].sae for j in wanted if _whole(j.settings)])
        if wanted:
            say(f"fused.stack: {len(stack)} of {len(wanted)} encoders in common products")
        if len(stack) and self.device.type == "cpu":
            say("warning: fused.stack gains nothing on a CPU, where single products are as fast")
        return stack

    def _interrupt(self, position: int) -> Interrupted:
        """Save every job that stands here; those ahead were saved where they are."""
        saved = [j for j in self.living() if j.alive()[0].step == position]
        self._at_once(saved, Job.save)
        return Interrupted(
            f"stopped at step {position:,}, saved {len(saved)} runs. "
            "Run the same command again to continue"
        )

    def _bar(self, jobs: Sequence[Job], position: int, steps: Mapping[int, int]) -> Any:
        return tqdm(
            total=max(steps[id(j)] for j in jobs),
            initial=position,
            desc=f"train {len(jobs)} SAEs",
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not any(j.settings.progress for j in jobs),
        )


def _of_hooks(batch: Batch, hooks: tuple[str, ...]) -> Batch:
    """The batch as a stream of these hooks alone gives it."""
    if tuple(batch.acts) == hooks:
        return batch
    return replace(batch, acts={h: batch.acts[h] for h in hooks})


def _whole(settings: TrainSettings) -> bool:
    """Whether the encoder meets a whole batch, in fp32: in bf16 it selects in two stages."""
    return settings.precision == "fp32" and settings.pieces == 1 and not settings.compile


def _raise(error: Exception) -> None:
    raise error


def _say_once(said: set[str], message: str) -> None:
    """What many jobs of a group would say in the same words."""
    if message not in said:
        said.add(message)
        say(message)


def _nothing(message: str) -> None:
    """What the first job of a group has said already."""
