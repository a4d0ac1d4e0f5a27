"""`saetrain report DIR`: one page for all runs below a folder, which opens from disk.

A table with only the settings that differ, a plot of any two numbers with the best trade-off
(Pareto) marked, and the curves of all runs. Everything is read from the run folders (config.json,
run.json, metrics.jsonl, eval.json), no store is opened; the page holds it as one JSON block that
sweep.js draws. Runs that have no evaluation yet show what they logged last and stay out of the
plot. Cost: reading the logs; at most 150 points of each curve go into the page.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saetrain.dashboard.report import plain, write_text
from saetrain.differing import differing, flat
from saetrain.errors import ConfigError
from saetrain.evals.run import EVAL
from saetrain.log import METRICS, read_metrics
from saetrain.runs import CONFIG, read_json
from saetrain.status import DAMAGED, statuses

PAGE = "sweep.html"
_POINTS = 150  # of a curve
_FIRST = ("fve", "l0", "mse", "dead")  # of the columns and of the choices for the axes
# More is better; of all other numbers less is, or it does not matter.
_MORE = ("fve", "explained", "recovered", "cosine", "tokens_per_s", "f1", "accuracy")
_CURVES = ("fve", "loss", "l0", "dead", "grad_norm")
_NOT_NUMBERS = ("n_tokens", "tokens", "contexts", "n_latents", "train_tokens", "steps")


def write_sweep(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page for all runs below `folder`, as `folder/sweep.html` or `out`; its path.

    Raises ConfigError if there is no such folder or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"report: {folder} is not a folder")
    target = folder / PAGE if out is None else Path(out)
    runs = [_run(folder, state, target.parent) for state in statuses(folder)]
    if not runs:
        raise ConfigError(f"report: there is no run (a folder with run.json) below {folder}")
    return write_text(target, _page(sweep_data(folder.resolve().name, runs)))


def sweep_data(title: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows: columns of settings that differ, numbers, and the runs."""
    numbers, settings = _numbers(runs), differing([r["config"] for r in runs])
    return {
        "title": title,
        "settings": settings,
        "numbers": numbers,
        "more": [n for n in numbers if any(word in n for word in _MORE)],
        "curves": [c for c in _CURVES if any(r["curves"].get(c) for r in runs)],
        # Without the other settings: they hold paths of this machine.
        "runs": [r | {"config": {k: r["config"].get(k) for k in settings}} for r in runs],
    }


def _run(folder: Path, state: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """One run: name, state, flat settings, numbers, curves, and where its own page is."""
    run_dir, config = folder / state["run"], dict[str, Any]()
    rows, scores = list[dict[str, Any]](), dict[str, Any]()
    if state["state"] != DAMAGED:
        rows, scores = read_metrics(run_dir / METRICS), read_json(run_dir / EVAL)
        config = flat(read_json(run_dir / CONFIG))
    finished = state["state"] == "finished"
    own = run_dir / "report.html"
    return {
        "name": state["run"],
        "link": quote(os.path.relpath(own, beside)) if own.is_file() else None,
        "state": state["state"],
        "reason": state["reason"],
        "progress": f"{state['step'] or 0:,} of {state['of'] or 0:,} steps",
        "config": config,
        "numbers": _scores(scores) if finished else {},
        "logged": {} if finished else _last(rows),
        "curves": {c: thinned(rows, c) for c in _CURVES},
    }


def _scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of eval.json."""
    kept = {k: v for k, v in scores.items() if k not in ("formulas", "density", *_NOT_NUMBERS)}
    return {k: v for k, v in flat(kept).items() if _is_number(v)}


def _last(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What was logged last of each number."""
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    return {k: last[k] for k in _FIRST if _is_number(last.get(k))}


def _numbers(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of numbers, the usual ones first, then those that differ between evaluated runs."""
    names = dict.fromkeys(n for r in runs for n in (*r["numbers"], *r["logged"]))
    evaluated = [r["numbers"] for r in runs if r["numbers"]]
    varied = [n for n in names if len({e.get(n) for e in evaluated}) > 1]
    first = [n for n in _FIRST if n in names]
    return first + [n for n in varied if n not in first]


def thinned(rows: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of the rows that have `key`: every n-th, and the last one."""
    known = [[r["step"], r[key]] for r in rows if _is_number(r.get(key))]
    stride = max(1, math.ceil(len(known) / _POINTS))
    last = known[-1:] if (len(known) - 1) % stride else []
    return known[::stride] + last


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _page(data: Mapping[str, Any]) -> str:
    """The HTML page around `data`, with the run page's style; nothing in `data` ends its block."""
    static = files("saetrain.dashboard") / "static"
    parts = {
        "title": html.escape(str(data["title"])),
        "css": "".join((static / f"{n}.css").read_text("utf-8") for n in ("report", "sweep")),
        "js": (static / "sweep.js").read_text("utf-8"),
        "data": json.dumps(plain(data), allow_nan=False).replace("<", "\\u003c"),
    }
    template = (static / "sweep.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)
