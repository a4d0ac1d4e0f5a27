"""What runs there are and where they stand: `saetrain sweep-status DIR`; what runs would need:
`saetrain plan`.

A run's state is that of run.json, except that "running" means it: a run whose folder no process
holds was stopped, and says so. Nothing is written.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from saetrain import plan
from saetrain.differing import flat, names
from saetrain.errors import ConfigError, TrainingError
from saetrain.evals.run import EVAL
from saetrain.expand import expand
from saetrain.log import METRICS, read_metrics, table
from saetrain.runs import CONFIG, LOCK, RUN, read_json
from saetrain.settings import TrainSettings
from saetrain.sweep import Opened, Opener, grouped
from saetrain.trainer import n_steps

DAMAGED = "damaged"  # state of a run whose files cannot be read


def statuses(folder: Path) -> list[dict[str, Any]]:
    """One row for each run below `folder`, by name; of a damaged one the reason.

    ConfigError if there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"sweep-status: {folder} is not a folder")
    dirs = [record.parent for record in sorted(folder.rglob(RUN))]
    named = names([flat(_config(d)) for d in dirs])
    return [_row(d, folder, name) for d, name in zip(dirs, named, strict=True)]


def _config(run_dir: Path) -> dict[str, Any]:
    with suppress(TrainingError):  # `_row` says so
        return read_json(run_dir / CONFIG)
    return {}


def _row(run_dir: Path, folder: Path, name: str) -> dict[str, Any]:
    try:
        read_json(run_dir / CONFIG)
        return _status(run_dir, folder, name)
    except TrainingError as e:
        row = dict.fromkeys(("step", "of", "tokens/s", "FVE", "L0"))
        run = str(run_dir.relative_to(folder))
        return {"run": run, "settings": name, "state": DAMAGED, **row, "reason": str(e)}


def _status(run_dir: Path, folder: Path, name: str) -> dict[str, Any]:
    record, final = read_json(run_dir / RUN), read_json(run_dir / EVAL)
    last: dict[str, Any] = {}
    for row in read_metrics(run_dir / METRICS):
        last |= row
    state = str(record.get("status"))
    if state == "running" and not _held(run_dir):
        state = "interrupted"
    finished = state == "finished"
    return {
        "run": str(run_dir.relative_to(folder)),
        "settings": name,
        "state": state,
        "step": last.get("step", 0),
        "of": record.get("n_steps"),
        "tokens/s": last.get("tokens_per_s"),
        "FVE": final.get("fve") if finished else last.get("fve"),
        "L0": final.get("l0") if finished else last.get("l0"),
        "reason": record.get("reason", ""),
    }


def _held(run_dir: Path) -> bool:
    """Whether a process on this machine holds the folder."""
    lock = run_dir / LOCK
    if not lock.exists():
        return False
    with lock.open() as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def status_table(folder: Path) -> str:
    """`statuses` as text, the number of runs in each state below."""
    rows = statuses(folder)
    if not rows:
        return f"no runs below {folder}"
    counts = {s: sum(r["state"] == s for r in rows) for s in sorted({r["state"] for r in rows})}
    rows = _without_empty(rows, ("settings", "reason"))
    return f"{table(rows)}\n\n" + ", ".join(f"{n} {state}" for state, n in counts.items())


def _without_empty(rows: list[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Without those of `columns` in which no row has anything."""
    empty = {c for c in columns if not any(r[c] for r in rows)}
    return [{k: v for k, v in r.items() if k not in empty} for r in rows]


def plan_table(many: Sequence[TrainSettings]) -> str:
    """Memory and hours of each run, and of all of them as a fused sweep would group them.

    Raises what `train` would for settings that cannot work.
    """
    opener = Opener()
    jobs = [opener.open(one) for settings in many for one in expand(settings)]
    named = names([flat(job.settings.to_dict()) for job in jobs])
    rows = [_needs(job, name) for job, name in zip(jobs, named, strict=True)]
    groups = grouped(jobs)
    hours, n = sum(row["hours"] for row in rows), len(jobs)
    return (
        f"{table(_without_empty(rows, ('settings',)))}\n\n"
        f"{n} run{'s' * (n > 1)}, {hours:.3g} hours of training steps; "
        f"fused: {len(groups)} group{'s' * (len(groups) > 1)} that read the store once each. "
        "Steps were timed on random rows; reading, evaluation and reports come on top"
    )


def _needs(job: Opened, name: str) -> dict[str, Any]:
    """A row of the plan."""
    needed = plan.memory(job.settings, job.source)
    step = plan.probe(job.settings, job.source, job.device)
    steps = n_steps(job.settings, job.source.train)
    return {
        "run": job.settings.run_name,
        "settings": name,
        "memory": plan.gb(needed.total),
        **{k: plan.gb(v) for k, v in vars(needed).items() if k != "held_out"},
        "steps": steps,
        "s/step": step,
        "hours": step * steps / 3600,
    }
