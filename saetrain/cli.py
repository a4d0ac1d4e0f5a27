"""The `saetrain` command: `saetrain KEY=VALUE …`, `saetrain -m …`, `saetrain evaluate RUN_DIR`.

Hydra composes the settings and is used nowhere else; from there on it is `TrainSettings`, the same
as in Python. Jobs of a sweep run one after the other; one that fails is reported, the others go on,
and the exit status is 1. Ctrl-C stops the whole sweep.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actcache.store.errors import ActcacheError
from actcache.store.records import did_you_mean, keys_at
from saetrain.errors import ConfigError, SaetrainError
from saetrain.evals.run import evaluate_run, final_table, summary
from saetrain.log import table
from saetrain.presets import config_dir
from saetrain.settings import TrainSettings
from saetrain.trainer import TrainResult, train

EVALUATE_HELP = """saetrain evaluate RUN_DIR [store=PATH | stores.LABEL=PATH …] [eval.metrics=[NAME]]

Evaluates a finished run again on held-out documents and rewrites its eval.json.
  RUN_DIR     a run folder, such as runs/topk_demo-1a2b3c4d
  store=PATH  where the run's store is now, if it has moved; of several stores.LABEL=PATH
  eval.metrics=[NAME,…] metrics_path=[FILE,…]  also metrics of your own"""


@dataclass
class _Jobs:
    """What the jobs of one command came to."""

    done: list[tuple[str, TrainResult]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 1 on an error, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _evaluate(args[1:]) if args[:1] == ["evaluate"] else _train(args)
    except (SaetrainError, ActcacheError) as e:
        _fail(str(e))
    except KeyboardInterrupt as e:
        print(f"interrupted: {e or 'run the same command again to continue'}", file=sys.stderr)
        sys.exit(130)


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
    jobs, sweep = _Jobs(), False

    def job(cfg: DictConfig) -> None:
        nonlocal sweep
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        overrides = " ".join(HydraConfig.get().overrides.task)
        if sweep:
            print(f"[{HydraConfig.get().job.num}] saetrain {overrides}", file=sys.stderr)
        try:
            jobs.done.append((overrides, train(settings_from(cfg))))
        except (SaetrainError, ActcacheError) as e:
            jobs.failed.append((overrides, str(e)))
            print(f"error: {e}", file=sys.stderr)

    _hydra(job, args)
    if sweep:
        _print_sweep(jobs)
    if jobs.failed:
        sys.exit(1)


def _hydra(job: Callable[[DictConfig], None], args: Sequence[str]) -> None:
    """Run `job` for every composed config; Hydra itself reads the command line from sys.argv."""
    saved = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["saetrain", *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, we print
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(job)()
    except HydraException as e:
        raise ConfigError(_explain(e)) from None
    except ValueError as e:
        if "Config group override" not in str(e):
            raise
        groups = ", ".join(sorted(d.name for d in config_dir().iterdir() if d.is_dir()))
        raise ConfigError(f"expected the name of a file for a group ({groups}): {e}") from None
    finally:
        sys.argv = saved[0]
        if saved[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved[1]


def _explain(error: HydraException) -> str:
    """Hydra's message; for an unknown key, the known ones instead of advice to append it."""
    wrong = re.match(r"Could not override '([^']+)'", str(error))
    if wrong is None or not isinstance(error.__cause__, OmegaConfBaseException):
        return str(error)
    *parents, key = wrong[1].split(".")
    known = keys_at(TrainSettings, parents)
    text = f"unknown key '{wrong[1]}'.{did_you_mean(key, known)}"
    if known:
        return f"{text} Known here: {', '.join(sorted(known))}"
    return f"{text} If it is a field that the yaml leaves out, write +{wrong[1]}=…"


def _print_sweep(jobs: _Jobs) -> None:
    """One row per job, named by the overrides that differ; the failed ones with their reason."""
    everything = [*jobs.done, *jobs.failed]
    common = set.intersection(*(set(overrides.split()) for overrides, _ in everything))

    def name(overrides: str) -> str:
        return " ".join(o for o in overrides.split() if o not in common) or overrides

    rows: list[dict[str, object]] = []
    for overrides, result in jobs.done:
        row = summary(result.run_dir, result.metrics)
        numbers = {key: row[key] for key in ("FVE", "L0")}
        rows.append({"job": name(overrides), **numbers, "folder": str(result.run_dir)})
    for overrides, reason in jobs.failed:
        rows.append({"job": name(overrides), "FVE": "failed", "L0": None, "folder": reason})
    print(f"\n{len(jobs.done)} of {len(rows)} jobs finished")
    print(table(rows))


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


if __name__ == "__main__":
    main()
