"""The training loop of one SAE, with a run folder around it that any kill leaves resumable.

batch -> losses -> backward -> before_step -> clip -> step -> after_step -> note_firing -> resample.
Numbers of a step stay on the device and are read together every `log_every` steps, so a GPU never
waits for the log; the price is that a non-finite loss is noticed up to `log_every` steps late (the
message names the step it happened at, and nothing is saved after it). On a CPU a run that was
interrupted anywhere and continued gives the same weights and the same metric rows, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.store import heap
from saetrain import checkpoint as ckpt
from saetrain import hopeless, runs
from saetrain.advice import advice, advice_alone
from saetrain.compiling import compiled
from saetrain.errors import ConfigError, TrainingError
from saetrain.evals import run as evals
from saetrain.hopeless import HopelessRun
from saetrain.interrupt import Interrupted, stop_flag
from saetrain.log import Logger, say
from saetrain.micro import backward
from saetrain.optim import Optimizer, schedule_factor
from saetrain.runs import BatchStream, Source
from saetrain.saes import make_sae
from saetrain.saes.base import Losses, Progress
from saetrain.settings import TrainSettings
from saetrain.stream import Batch
from saetrain.stream.told import Told
from saetrain.window import Window


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run left behind."""

    run_dir: Path
    metrics: dict[str, Any]  # content of eval.json
    trained_steps: int  # in this call; 0 if the run was already finished

    def table(self) -> str:
        """The table that every run ends with."""
        return evals.final_table(self.run_dir, self.metrics)


def train(
    settings: TrainSettings,
    *,
    stream: BatchStream | None = None,
    held_out: BatchStream | None = None,
) -> TrainResult:
    """Train, evaluate and save one SAE; continue where an earlier call with equal settings stopped.

    `stream` and `held_out` replace the store's own batches (both or neither). A finished run
    returns at once. Raises ConfigError for settings that cannot work, StoreError for an unusable
    store, TrainingError for a run folder in the way or a non-finite loss, Interrupted on Ctrl-C.
    """
    if settings.several_hooks:
        raise ConfigError(
            "train: hooks, layers and layer_stride train one SAE a hook. Call "
            "saetrain.sweep.train_together([settings]), or give one hook"
        )
    for word in advice_alone(settings):
        say(word)
    device = runs.resolve_device(settings.device)
    settings, source = runs.sources(settings, stream, held_out, device)
    with ckpt.own_generator(settings.seed, device):
        result = _train(settings, source, device)
    print(result.table())
    return result


def _train(settings: TrainSettings, source: Source, device: torch.device) -> TrainResult:
    run_dir, record = settings.run_dir, runs.describe(settings, source)
    known = runs.earlier(run_dir, record, fresh=settings.fresh)
    if known.get("status") == "finished":
        return finished(settings, source)
    trainer = Trainer(settings, source, device)  # bad settings fail before any file is written
    record |= trainer.facts
    with running(trainer, record) as logger:
        started = trainer.step
        trainer.fit(logger)
        metrics = complete(trainer, record, logger)
    return TrainResult(run_dir=run_dir, metrics=metrics, trained_steps=trainer.step - started)


@contextmanager
def running(
    trainer: Trainer,
    record: Mapping[str, Any],
    *,
    bar: bool = True,
    warn: Callable[[str], None] = say,
) -> Iterator[Logger]:
    """Hold the run's folder, write what describes it, continue where an earlier call stopped."""
    settings = trainer.settings
    with runs.claimed(settings.run_dir, fresh=settings.fresh):
        hopeless.refuse_stopped(runs.read_json(settings.run_dir / runs.RUN), settings.early_stop)
        runs.write_json(settings.run_dir / runs.CONFIG, settings.to_dict())
        runs.write_json(settings.run_dir / runs.RUN, {**record, "status": "running"})
        trainer.resume()
        for word in advice(settings, trainer.sae.cfg.dead_after_tokens, trainer.n_steps):
            warn(word)
        with trainer.logger(bar=bar) as logger:
            yield logger


def complete(
    trainer: Trainer, record: Mapping[str, Any], logger: Logger, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """After the last step: finish, report. The content of eval.json, `known` if that is done."""
    settings = trainer.settings
    metrics = known or trainer.finish(record, progress=settings.progress)
    logger.final(evals.scalars(metrics))
    runs.write_json(settings.run_dir / runs.RUN, {**record, "status": "finished"})
    if settings.report:
        evals.report(settings.run_dir, trainer.source.snapshot, progress=settings.progress)
    return metrics


def finished(settings: TrainSettings, source: Source) -> TrainResult:
    """What a run that an earlier call finished came to; its report is written if it is missing."""
    run_dir = settings.run_dir
    say(f"{run_dir} is finished; fresh=true trains it again")
    if settings.report and not (run_dir / "report.html").exists():
        evals.report(run_dir, source.snapshot, progress=settings.progress)
    metrics = runs.read_json(run_dir / evals.EVAL)
    return TrainResult(run_dir=run_dir, metrics=metrics, trained_steps=0)


class Trainer:
    """One SAE, its optimizer and its place in the stream."""

    def __init__(self, settings: TrainSettings, source: Source, device: torch.device) -> None:
        self.settings, self.source, self.device = settings, source, device
        if device.type == "cpu":
            heap.keep()
            heap.share()
        self.n_steps = n_steps(settings, source.train)
        self.sae = make_sae(settings.sae, source.spaces(), settings.saes_path).to(device)
        self.optim = Optimizer(self.sae, settings.optim, self.sae.n_latents, self.n_steps)
        self._compute = compiled(self.sae.losses, device) if settings.compile else self.sae.losses
        self.step = 0  # steps done
        self.seconds = 0.0  # of training, over all starts
        self.window = Window()
        self._waited = self._row_time = self._began = 0.0  # see `begin`
        self.told = Told(source.train, say)
        self.facts = {
            "n_steps": self.n_steps,
            "lr": self.optim.lr,
            "n_latents": self.sae.n_latents,
            "d_in": self.sae.d_in,
        }

    def fit(self, logger: Logger) -> None:
        """Train to the last step, logging, evaluating and writing checkpoints on the way."""
        self.begin()
        batches = iter(self.source.train)
        with stop_flag() as stop:
            while self.step < self.n_steps:
                self.take(self._next(batches), logger)
                if stop.is_set():
                    raise self._interrupt()
        logger.training_done()
        self.told.end()

    def begin(self, like: Told | None = None) -> None:
        """Start the clocks, before the first `take` of this process.

        What is told of the stream is measured, or is that of `like`, which reads the same one.
        """
        if like is not None:
            self.told.begin_like(like)
        elif self.step < self.n_steps:
            self.told.begin()
        self._waited, self._row_time = 0.0, time.perf_counter()
        self._began = self._row_time - self.seconds  # had it never stopped

    def take(self, batch: Batch, logger: Logger) -> None:
        """One step on `batch`, and whatever is due after it. TrainingError if it diverged."""
        self.learn(batch)
        self.tell(logger)
        if self.save_due:
            self.save()

    def learn(self, batch: Batch) -> None:
        """One step on `batch`. Nothing but this SAE is touched, so another may learn meanwhile."""
        self._train_step(batch)
        self.seconds = time.perf_counter() - self._began

    def waited(self, seconds: float) -> None:
        """Count `seconds` as waiting for data, in the next row of metrics."""
        self._waited += seconds

    def logger(self, *, bar: bool = True) -> Logger:
        """The outputs of this run from the present step on; `bar` as far as settings want one."""
        cfg = self.settings
        return Logger(
            cfg.run_dir,
            cfg.wandb,
            cfg.to_dict(),
            start_step=self.step,
            n_steps=self.n_steps,
            batch_tokens=cfg.batch_tokens,
            progress=cfg.progress and bar,
        )

    def _next(self, batches: Iterator[Batch]) -> Batch:
        asked = time.perf_counter()
        batch = next(batches)
        self.waited(time.perf_counter() - asked)
        if batch.n_tokens != self.settings.batch_tokens:
            raise ConfigError(
                f"the stream gives batches of {batch.n_tokens} tokens, the settings say "
                f"batch_tokens={self.settings.batch_tokens}"
            )
        return batch

    def _train_step(self, batch: Batch) -> None:
        sae, optim, acts = self.sae, self.optim, batch.inputs
        if self.step == 0:
            with torch.no_grad():
                sae.init_from_data(acts)
        tokens = (self.step + 1) * self.settings.batch_tokens
        progress = Progress(step=self.step, n_steps=self.n_steps, tokens=tokens)
        numbers, last = backward(sae, self._losses, acts, progress, self.settings.pieces)
        sae.before_step()
        norm = optim.clip()
        optim.step(schedule_factor(self.step, self.n_steps, self.settings.schedule))
        sae.after_step()
        optim.forget(sae.resample(last, progress))
        optim.average()
        self.window.add({**numbers, "grad_norm": norm})
        self.step += 1

    def _losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self._compute(acts, progress)

    def tell(self, logger: Logger) -> None:
        """Rows of metrics that are due now that `self.step` steps are done, after `learn`."""
        cfg, last = self.settings, self.step == self.n_steps
        logger.advance()
        if self.step % cfg.log_every == 0 or last:
            logger.row(row := self._row())
            self._stop_if_hopeless(row)
        if cfg.eval.every_steps and self.step % cfg.eval.every_steps == 0 and not last:
            self._check_finite()
            with self.optim.averaged(self.sae.after_step):
                sae = self.sae.to_inference()
                result = evals.evaluate_sae(sae, self.source, cfg.eval, progress=cfg.progress)
            logger.row({"step": self.step, **evals.scalars(result)})

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint is due, after `tell`."""
        every = self.settings.checkpoint.every_steps or self.n_steps
        return self.step == self.n_steps or self.step % every == 0

    def _stop_if_hopeless(self, row: Mapping[str, Any]) -> None:
        """Save and raise HopelessRun if `early_stop` says so; not after the last step."""
        rule, file = self.settings.early_stop, self.settings.run_dir / runs.RUN
        reason = rule.reason(row)
        if reason is not None and self.step < self.n_steps:
            self.save()
            record = hopeless.record(rule, f"{hopeless.EARLY}{self.step:,}: {reason}")
            runs.write_json(file, runs.read_json(file) | record)
            raise HopelessRun(f"{record['reason']}. {hopeless.REMEDY}")

    def _row(self) -> dict[str, Any]:
        """Means over the steps since the last row; fve = 1 - fvu, by the store's variance.

        The timings count from the start of this process where that is later than the last row.
        """
        self._check_finite()
        batch_tokens = self.settings.batch_tokens
        done, means = len(self.window), self.window.take(self.step)
        now = time.perf_counter()
        seconds = now - self._row_time
        factor = schedule_factor(self.step - 1, self.n_steps, self.settings.schedule)
        row: dict[str, Any] = {"step": self.step, "tokens": self.step * batch_tokens, **means}
        if "fvu" in row:
            row["fve"] = 1.0 - row["fvu"]
        row |= {"dead": float(self.sae.dead.float().mean()), "lr": self.optim.lr * factor}
        row |= {"tokens_per_s": done * batch_tokens / seconds, "data_wait": self._waited / seconds}
        row |= self.told.reading(self._waited, seconds)
        if self.step <= self.settings.log_every:
            row |= self.told.mixing()
        self._waited, self._row_time = 0.0, now
        return row | {"seconds": self.seconds}

    def _check_finite(self) -> None:
        """TrainingError, with the remedy, if a number or a weight is not finite."""
        try:
            self.window.check(self.step)
            broken = [n for n, p in self.sae.named_parameters() if not p.isfinite().all()]
            if broken:
                raise TrainingError(
                    f"training diverged by step {self.step}: not finite: {', '.join(broken)}"
                )
        except TrainingError as e:
            raise TrainingError(
                f"{e}. Lower optim.lr (it is {self.optim.lr:.3g}) or optim.clip_norm; what was "
                f"saved in {self.settings.run_dir} is from before"
            ) from None

    def save(self, generators: Mapping[str, Tensor] | None = None) -> Path:
        """Write a checkpoint of this step, with torch's generators as they are, or as given."""
        self._check_finite()
        generators = generators or ckpt.rng_tensors(self.device)
        state = ckpt.Checkpoint(
            step=self.step,
            sae=self.sae.state_dict(),
            optim=self.optim.tensors(),
            trainer={**generators, **self.window.tensors()},
            stream=self.source.train.state_dict(),
            facts={"names": self.window.names, "seconds": self.seconds},
        )
        return ckpt.save(
            self.settings.run_dir / "checkpoints", state, self.settings.checkpoint.keep
        )

    def resume(self) -> int:
        """Continue from the newest whole checkpoint, if any; the number of steps done by then."""
        run_dir = self.settings.run_dir
        saved = ckpt.newest(run_dir / "checkpoints", say)
        if saved is None:
            return 0
        self.sae.load_state_dict(saved.sae)
        self.optim.load_tensors(saved.optim)
        self.source.train.load_state_dict(saved.stream)
        ckpt.load_rng(saved.trainer, self.device)
        self.window.load(saved.facts["names"], saved.trainer, self.device)
        self.step, self.seconds = saved.step, saved.facts["seconds"]
        say(f"continuing {run_dir} at step {self.step:,} of {self.n_steps:,}")
        return self.step

    def finish(self, record: Mapping[str, Any], *, progress: bool) -> dict[str, Any]:
        """Save the inference SAE, evaluate it on held-out documents, write eval.json.

        With averaged weights it is the average that is saved and evaluated.
        """
        with self.optim.averaged(self.sae.after_step):
            return self._finish(record, progress)

    def _finish(self, record: Mapping[str, Any], progress: bool) -> dict[str, Any]:
        run_dir, cfg = self.settings.run_dir, self.settings.eval
        self.sae.calibrate(batch.inputs for batch in self.source.held_out.one_pass())
        sae = self.sae.to_inference()
        sae.save(run_dir / evals.SAE_FOLDER, source=record)
        metrics = evals.evaluate_with_baseline(sae, self.source, cfg, progress=progress)
        metrics["train_tokens"] = self.step * self.settings.batch_tokens
        metrics |= {"steps": self.step, "seconds": self.seconds}
        runs.write_json(run_dir / evals.EVAL, metrics)
        return metrics

    def _interrupt(self) -> Interrupted:
        folder = self.save()
        return Interrupted(
            f"stopped at step {self.step:,} of {self.n_steps:,}, saved {folder}. "
            "Run the same command again to continue"
        )


def n_steps(settings: TrainSettings, stream: BatchStream) -> int:
    """Whole batches only: tokens // batch_tokens, or epochs * batches of an epoch."""
    if stream.batches_per_epoch == 0:
        raise ConfigError(
            f"batch_tokens={settings.batch_tokens:,} is more than the training split has; lower "
            "batch_tokens or cache more tokens"
        )
    if settings.epochs is not None:
        if stream.batches_per_epoch is None:
            raise ConfigError(
                f"epochs={settings.epochs}: this stream does not know how long an epoch is before "
                "its data has ended. Give tokens=… and epochs=null"
            )
        return settings.epochs * stream.batches_per_epoch
    assert settings.tokens is not None  # TrainSettings
    if settings.tokens < settings.batch_tokens:
        raise ConfigError(
            f"tokens={settings.tokens:,} is less than one batch of {settings.batch_tokens:,}"
        )
    return settings.tokens // settings.batch_tokens
