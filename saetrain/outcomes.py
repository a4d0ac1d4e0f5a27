"""What the jobs of a sweep came to, wherever they ran, and the number that a sweeper maximises.

Jobs may run in this process, in others of this machine, or in Slurm's: each appends one line to
a file that the command names in an environment variable, and the command reads it at the end. Lines
are short and appended in one write, so jobs do not disturb each other.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saetrain.evals.run import EVAL, summary
from saetrain.hopeless import EARLY
from saetrain.log import table
from saetrain.runs import read_json

RECORD = "SAETRAIN_SWEEP_RECORD"  # path of the file, in the environment
FAILED = -math.inf  # score of a job without a result: below every other, so no sweeper picks it


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One job: where its run is, or the reason why there is none."""

    job: int  # number within the sweep
    overrides: tuple[str, ...]
    run_dir: str | None = None
    score: float | None = None
    target_l0: float | None = None
    reason: str | None = None


def score(metrics: Mapping[str, Any], target_l0: float | None) -> float:
    """FVE on held-out documents, or FVE - |L0 / target_l0 - 1|.

    1 % more latents raise FVE by far less than 0.01, so leaving the target never pays: among equal
    methods the largest score is at the target.
    """
    fve = float(metrics["fve"])
    return fve if target_l0 is None else fve - abs(float(metrics["l0"]) / target_l0 - 1)


def new_record(args: Sequence[str]) -> Path:
    """Path for the lines of one command, below the runs_dir that its arguments name; below `runs`
    where they name one for each job."""
    given = [a.removeprefix("runs_dir=") for a in args if a.startswith("runs_dir=")]
    given = [name for name in given if not re.search(r"[${},()]", name)]
    # Random: two commands of one process, or of two machines, can begin in the same second.
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.jsonl"
    return (Path(given[-1] if given else "runs").expanduser() / ".sweeps" / name).absolute()


def note(outcome: Outcome) -> None:
    """Append to the file of the sweep that this process works for; nothing outside a sweep."""
    if RECORD not in os.environ:
        return
    file = Path(os.environ[RECORD])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(json.dumps(asdict(outcome), allow_nan=False) + "\n")


def read(file: Path) -> list[Outcome]:
    """Outcomes by job number; empty if no job wrote one."""
    if not file.exists():
        return []
    found = [json.loads(line) for line in file.read_text().splitlines()]
    made = [Outcome(**{**o, "overrides": tuple(o["overrides"])}) for o in found]
    return sorted(made, key=lambda o: o.job)


def told(outcomes: Sequence[Outcome]) -> str:
    """One row per job, named by the overrides that differ; the failed ones with their reason."""
    common = set.intersection(*(set(o.overrides) for o in outcomes))
    rows: list[dict[str, object]] = []
    for o in sorted(outcomes, key=lambda o: o.run_dir is None):
        name = " ".join(w for w in o.overrides if w not in common) or f"job {o.job}"
        early = (o.reason or "").startswith(EARLY)
        state = "stopped" if early else "failed"
        row: dict[str, object] = {"job": name, "FVE": state, "L0": None, "folder": o.reason}
        if o.run_dir is not None:
            numbers = summary(Path(o.run_dir), read_json(Path(o.run_dir) / EVAL))
            row |= {"FVE": numbers["FVE"], "L0": numbers["L0"], "folder": o.run_dir}
        rows.append(row)
    done = sum(o.run_dir is not None for o in outcomes)
    head = f"\n{done} of {len(rows)} job{'s' * (len(rows) > 1)} finished\n"
    return f"{head}{table(rows)}{_best(outcomes)}{_page(outcomes)}"


def _best(outcomes: Sequence[Outcome]) -> str:
    """The job with the highest score, where a target makes that another number than FVE."""
    scored = [(o.score, o) for o in outcomes if o.score is not None and o.target_l0 is not None]
    if not scored:
        return ""
    top, best = max(scored, key=lambda pair: pair[0])
    return f"\nbest at L0 = {best.target_l0:g}: {best.run_dir} (score {top:.4f})"


def _page(outcomes: Sequence[Outcome]) -> str:
    """What draws all runs, where there are several."""
    folders = [Path(o.run_dir).parent.absolute() for o in outcomes if o.run_dir is not None]
    if len(folders) < 2:
        return ""
    common = os.path.relpath(os.path.commonpath(folders))
    return f"\none page for all of them: saetrain report {common}"
