"""Several SAEs trained on one stream: each batch is read once and goes to all of them in turn.

Every job is a `Trainer` of its own: optimizer, schedule, checkpoints, run folder, metrics, wandb
run. What a single run would share with nobody, torch's random generator, is swapped at each turn.
So on a CPU a job gives the weights and the metric rows of its single run, bit for bit. Jobs may
have different lengths, and stand at different steps after a kill: the stream starts where the
slowest one is, and the others join when it reaches them. A job that fails is dropped, its reason
in run.json; the others go on. Evaluation comes after all training: held-out batches are kept in
memory if they are few, and the PCA beside the SAEs is fitted once.

On a CPU several jobs take their steps at once (`fused.workers`, `saetrain.workers`); those that
draw random numbers (`SAE.draws_random`) or are compiled go one after the other, with all threads. A
turn is a few batches, as far as nothing is due in between, so that workers wait for each other less
often. Logs, wandb and failures are this thread's business.

Cost: weights and moments of all jobs in memory, gradients and activations of one a worker, and the
batches of a turn.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, cast

import torch
from tqdm import tqdm

from actcache.store.errors import ActcacheError
from saetrain import checkpoint as ckpt
from saetrain.errors import SaetrainError, TrainingError
from saetrain.hopeless import HopelessRun
from saetrain.interrupt import Interrupted, stop_flag
from saetrain.kept import Kept
from saetrain.lockstep_job import Job
from saetrain.log import say
from saetrain.runs import BatchStream
from saetrain.settings import TrainSettings
from saetrain.stack import Stack
from saetrain.stream import Batch
from saetrain.stream.told import Told
from saetrain.workers import Workers, how_many, turn_length

_DRAWN = (
    "its step went beside others, and one of them drew random numbers, although draws_random of "
    "its class is False. Correct that, or set fused.workers=1"
)


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
        with _bar_of(jobs, "evaluate", "run", total=len(beside)) as bar:

            def measure(job: Job) -> None:
                job.measure()
                bar.update()

            self._at_once([j for j in beside if j.trainer], measure)

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
        all_steps, what = max(steps[id(j)] for j in active), f"train {len(active)} SAEs"
        bars = _bar_of(active, what, "step", total=all_steps, done=position)
        with closing(batches), bars as bar, stop_flag() as stop:
            while active:
                now = [j for j in active if j.alive()[0].step == position]
                asked = time.perf_counter()
                turn = self._take(batches, 1 if len(stack) else _until_due(active, position))
                waited = time.perf_counter() - asked
                for job in now:
                    job.alive()[0].waited(waited)
                # The first step may change weights before it encodes: not stacked.
                self._step(now, turn, stack if position else None)
                position += len(turn)
                bar.update(len(turn))
                active = [j for j in active if j.trainer and position < steps[id(j)]]
                if stop.is_set():
                    raise self._interrupt(position)
        for job in self.living()[:1]:
            job.alive()[0].told.end()

    def _take(self, batches: Iterator[Batch], n: int) -> list[Batch]:
        """The next batches, n at most, as many as fit."""
        turn = [next(batches)]
        size = sum(4 * x.numel() for x in turn[0].acts.values())
        more = min(n, turn_length(size)) - 1
        return [*turn, *(next(batches) for _ in range(more))]

    def _step(self, now: Sequence[Job], turn: Sequence[Batch], stack: Stack | None) -> None:
        """These batches through the jobs that stand here."""
        place = self.stream.state_dict()
        for train in {id(j.source.train): j.source.train for j in now}.values():
            if train is not self.stream:  # its state goes into checkpoints
                train.load_state_dict(place)
        if stack is not None:
            stack.encode([j.alive()[0].sae for j in now], turn[0])
        beside = [j for j in now if self.workers.n > 1 and j.beside]
        self._at_once(beside, lambda j: j.learn(turn))
        for job in now:
            if job not in beside:
                self._attempt(job, partial(job.learn, turn))
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


def _bar_of(jobs: Sequence[Job], what: str, unit: str, *, total: int, done: int = 0) -> Any:
    """A bar for all of them, if one of them wants bars."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        mininterval=0.5,
        dynamic_ncols=True,
        disable=not any(j.settings.progress for j in jobs),
    )


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


def _until_due(active: Sequence[Job], position: int) -> int:
    """Steps from `position` until a job has something else to do, or one ahead is reached."""
    steps = [(j, j.alive()[0].step - position) for j in active]
    return min(ahead or j.until_due for j, ahead in steps)
