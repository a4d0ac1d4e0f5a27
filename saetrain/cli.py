"""The `saetrain` command: `saetrain KEY=VALUE …`, `saetrain -m …`, `saetrain evaluate RUN_DIR`.

Hydra composes the settings and is used nowhere else; from there on it is `TrainSettings`, the same
as in Python. Jobs of a sweep run one after the other, or as hydra/launcher says; one that fails is
reported, the others go on, and the exit status is 1. Ctrl-C stops the whole sweep.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actcache.store.errors import ActcacheError
from actcache.store.records import did_you_mean, keys_at
from saetrain import outcomes
from saetrain.dashboard.plots import write_plots
from saetrain.dashboard.sweep import write_sweep
from saetrain.errors import ConfigError, SaetrainError
from saetrain.evals.run import evaluate_run, final_table
from saetrain.jobs import Task, train_jobs
from saetrain.log import say
from saetrain.outcomes import Outcome
from saetrain.presets import config_dir
from saetrain.settings import TrainSettings
from saetrain.status import plan_table, status_table
from saetrain.trainer import train

EVALUATE_HELP = """saetrain evaluate RUN_DIR [store=PATH | stores.LABEL=PATH …]
                          [eval.metrics=[NAME,…]] [metrics_path=[FILE,…]]

Evaluates a finished run again on held-out documents and rewrites its eval.json.
  RUN_DIR     a run folder, such as runs/topk_demo-1a2b3c4d
  store=PATH  where the run's store is now, if it has moved; of several stores.LABEL=PATH
  eval.metrics=[NAME,…] metrics_path=[FILE,…]  also metrics of your own"""

STATUS_HELP = """saetrain sweep-status DIR

State, step, tokens a second, FVE and L0 of all runs below DIR, of running ones as last logged."""

REPORT_HELP = """saetrain report DIR

Writes DIR/sweep.html for all runs below DIR: a sortable table of what differs, any two numbers
against each other with the best trade-off, curves, and links to the page of each run. Opens from
disk."""

PLOTS_HELP = """saetrain plots RUN_DIR

Writes the curves and the density histogram of a run as PNG files into RUN_DIR/plots."""

# Hydra plugins that files in conf/ build on: what they name -> where it comes from.
PLUGINS = {
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/submitit": "hydra-submitit-launcher",
    "hydra/launcher/ray": "hydra-ray-launcher",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
    "hydra/sweeper/sampler/tpe": "hydra-optuna-sweeper",
}

# A job of a sweep: number, overrides, and how to compose its settings.
Composed = tuple[int, tuple[str, ...], Callable[[], DictConfig]]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 1 on an error, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _command(args)
        command(args[1:]) if command else _train(args)
    except (SaetrainError, ActcacheError) as e:
        _fail(str(e))
    except KeyboardInterrupt as e:
        told = str(e) or "run the same command again to continue"
        print(f"interrupted: {told}", file=sys.stderr)
        sys.exit(130)


def _command(args: Sequence[str]) -> Callable[[Sequence[str]], None] | None:
    """What the first word names; None: settings to train. ConfigError for a misspelt command."""
    if not args:
        return None
    word = re.fullmatch(r"[a-z][a-z_-]*", args[0]) and args[0]
    if word and word not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        raise ConfigError(
            f"{word!r} is no command.{did_you_mean(word, _COMMANDS)} There are {known}; "
            "settings to train are KEY=VALUE"
        )
    return _COMMANDS.get(args[0])


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def settings_from(cfg: DictConfig) -> TrainSettings:
    """Composed config -> settings. ConfigError on unknown keys, wrong types, missing values."""
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise ConfigError(str(e)) from None
    return TrainSettings.from_mapping(values)


def _train(args: Sequence[str]) -> None:
    record, failed = outcomes.new_record(args), list[str]()

    def job(cfg: DictConfig) -> float:
        """One job, here or in another process; its score. A sweep's failures go to its record."""
        own = HydraConfig.get()
        sweep, words = own.mode == RunMode.MULTIRUN, tuple(own.overrides.task)
        launcher = own.runtime.choices["hydra/launcher"]
        if not sweep and launcher != "basic":
            say(f"hydra/launcher={launcher} has no effect without -m")
        number = own.job.num if sweep else 0
        if sweep:
            print(f"[{number}] saetrain {' '.join(words)}", file=sys.stderr)
        try:
            settings = settings_from(cfg)
            if settings.several_hooks:
                task = Task(number=number, overrides=words, settings=lambda: settings)
                return train_jobs([task])[0]
            result = train(settings)
        except (SaetrainError, ActcacheError) as e:
            print(f"error: {e}", file=sys.stderr)
            failed.append(str(e))
            if sweep:
                outcomes.note(Outcome(job=number, overrides=words, reason=str(e)))
            return outcomes.FAILED
        score = outcomes.score(result.metrics, settings.target_l0)
        if sweep:
            made = Outcome(job=number, overrides=words, run_dir=str(result.run_dir), score=score)
            outcomes.note(replace(made, target_l0=settings.target_l0))
        return score

    def together(jobs: Sequence[Composed]) -> list[float]:
        """All jobs of a sweep at once: hydra/launcher=fused."""
        return train_jobs([_task(*job) for job in jobs])

    job.together = together  # type: ignore[attr-defined]
    with _environment({outcomes.RECORD: str(record)}):
        _hydra(job, args)
    found = outcomes.read(record)
    if len(found) > 1 or any(o.run_dir for o in found):  # else its error has been told
        print(outcomes.told(found))
    if failed or any(o.run_dir is None for o in found):
        sys.exit(1)


def _task(number: int, overrides: tuple[str, ...], compose: Callable[[], DictConfig]) -> Task:
    return Task(number=number, overrides=overrides, settings=lambda: settings_from(compose()))


def _plan(args: Sequence[str]) -> None:
    """Settings composed as for training, and nothing trained or left behind."""
    many, errors = list[TrainSettings](), list[SaetrainError]()

    def job(cfg: DictConfig) -> float:
        try:
            many.append(settings_from(cfg))
        except SaetrainError as e:  # raised here, Hydra would print it, too
            errors.append(e)
        return 0.0

    def together(jobs: Sequence[Composed]) -> list[float]:
        return [job(compose()) for _, _, compose in jobs]

    job.together = together  # type: ignore[attr-defined]
    with TemporaryDirectory() as scratch:  # a sweep's multirun.yaml
        _hydra(job, [*args, f"hydra.sweep.dir={scratch}"])
    if errors:
        raise errors[0]
    if many:  # none where Hydra only printed help or settings
        print(plan_table(many))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """`values` in the environment, of this process and of those it starts, for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _hydra(job: Callable[[DictConfig], float], args: Sequence[str]) -> None:
    """Run `job` for every composed config; Hydra itself reads the command line from sys.argv."""
    saved = sys.argv
    # -m first: argparse takes settings in one row only.
    sys.argv = ["saetrain", *sorted(args, key=lambda word: word not in ("-m", "--multirun"))]
    try:
        with _environment({"HYDRA_FULL_ERROR": "1"}):  # Hydra raises instead of printing, we print
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(
                job
            )()
    except HydraException as e:
        raise ConfigError(_explain(e)) from None
    except RuntimeError as e:
        if "srun" not in str(e):  # submitit's: it has no error of its own for this
            raise
        raise ConfigError(
            "hydra/launcher=slurm: this machine has no Slurm (srun is not found). Start the sweep "
            "where sbatch works, or take hydra/launcher=box or fused"
        ) from None
    except ValueError as e:
        if "Config group override" not in str(e):
            raise
        groups = ", ".join(sorted(d.name for d in config_dir().iterdir() if d.is_dir()))
        raise ConfigError(f"expected the name of a file for a group ({groups}): {e}") from None
    finally:
        sys.argv = saved


def _explain(error: HydraException) -> str:
    """Hydra's message; for an unknown key, the known ones instead of advice to append it."""
    for plugin, package in PLUGINS.items():
        if plugin in str(error) and "Could not" in str(error):
            first = str(error).splitlines()[0]
            return f"{first} It comes with another package: pip install {package}"
    wrong = re.match(r"Could not override '([^']+)'", str(error))
    if wrong is None or not isinstance(error.__cause__, OmegaConfBaseException):
        return str(error)
    *parents, key = wrong[1].split(".")
    known = keys_at(TrainSettings, parents)
    if key in known:
        return (
            f"'{wrong[1]}' is left out by the yaml that was chosen; add it with a plus: "
            f"+{wrong[1]}=…"
        )
    text = f"unknown key '{wrong[1]}'.{did_you_mean(key, known)}"
    if known:
        return f"{text} Known here: {', '.join(sorted(known))}"
    return f"{text} If it is a field that the yaml leaves out, write +{wrong[1]}=…"


def _status(args: Sequence[str]) -> None:
    print(status_table(_folder(args, STATUS_HELP)))


def _plots(args: Sequence[str]) -> None:
    for file in write_plots(_folder(args, PLOTS_HELP)):
        print(f"wrote {file}")


def _report(args: Sequence[str]) -> None:
    print(f"wrote {write_sweep(_folder(args, REPORT_HELP))}")


def _folder(args: Sequence[str], usage: str) -> Path:
    """The only argument; exits with `usage` if it is not there or not alone."""
    if len(args) != 1 or args[0].startswith("-"):
        print(usage)
        sys.exit(0 if {"-h", "--help"} & set(args) else 1)
    return Path(args[0])


def _evaluate(args: Sequence[str]) -> None:
    if not args or {"-h", "--help"} & set(args):
        print(EVALUATE_HELP)
        sys.exit(0 if args else 1)
    folders = [a for a in args if "=" not in a]
    options = dict(a.split("=", 1) for a in args if "=" in a and a not in folders)
    stores = {k.removeprefix("stores."): v for k, v in options.items() if k.startswith("stores.")}
    lists = {k: options.get(k, "").strip("[]") for k in ("eval.metrics", "metrics_path")}
    metrics, paths = ([w.strip() for w in v.split(",") if w.strip()] for v in lists.values())
    unknown = {k for k in options if k not in ("store", *lists) and not k.startswith("stores.")}
    if len(folders) != 1 or unknown:
        raise ConfigError(
            "evaluate: expected RUN_DIR [store=PATH | stores.LABEL=PATH …] [eval.metrics=[NAME,…]] "
            f"[metrics_path=[FILE,…]], got {' '.join(args)}"
        )
    run_dir = Path(folders[0])
    store = options.get("store")
    found = evaluate_run(run_dir, store, stores, metrics=metrics, metrics_path=paths)
    print(final_table(run_dir, found))


_COMMANDS = {
    "evaluate": _evaluate,
    "plan": _plan,
    "plots": _plots,
    "report": _report,
    "sweep-status": _status,
}

if __name__ == "__main__":
    main()
