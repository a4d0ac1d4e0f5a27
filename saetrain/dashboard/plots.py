"""`saetrain plots RUN_DIR`: the curves and the density histogram of a run as PNG files.

The same series as on the run's page, for papers and slides: from metrics.jsonl and eval.json, with
no store, no network and no display. Needs matplotlib. Cost: about a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saetrain.dashboard.report import charts
from saetrain.errors import ConfigError
from saetrain.evals.run import EVAL
from saetrain.log import METRICS, read_metrics
from saetrain.runs import read_json

FOLDER = "plots"


def write_plots(run_dir: str | Path) -> list[Path]:
    """Write RUN_DIR/plots/{loss,fve,l0,dead_latents,density}.png, as far as there are numbers.

    The density comes with the evaluation, at the end of a run; the curves of a run that is still
    going are as long as its log. Raises ConfigError if there is no log or no matplotlib.
    """
    run_dir = Path(run_dir)
    rows, scores = read_metrics(run_dir / METRICS), read_json(run_dir / EVAL)
    if not rows:
        raise ConfigError(f"plots: {run_dir} has no {METRICS} with a row in it")
    (run_dir / FOLDER).mkdir(exist_ok=True)
    made = []
    for chart in charts(rows, scores):
        name = chart["title"].lower().replace(" ", "_")
        made.append(_curves(chart, run_dir / FOLDER / f"{name}.png"))
    if scores.get("density"):
        made.append(_density(scores["density"], run_dir / FOLDER / "density.png"))
    return made


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots: needs matplotlib, which is not installed. pip install matplotlib"
        ) from None
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(chart: Mapping[str, Any], file: Path) -> Path:
    """Lines over steps; a series of one point is a dot."""
    figure, axes = _axes()
    for series in chart["series"]:
        steps, _, values = zip(*series["points"], strict=True)
        axes.plot(steps, values, marker="o" if len(steps) == 1 else None, label=series["name"])
    if chart["title"] == "Loss" and _wide(chart["series"]):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=chart["title"])
    axes.legend(frameon=False)
    figure.savefig(file)
    return file


def _wide(series: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all values are above 0 and span more than a factor of 20."""
    values = [p[2] for s in series for p in s["points"]]
    return bool(min(values) > 0 and max(values) > 20 * min(values))


def _density(density: Mapping[str, Any], file: Path) -> Path:
    """Latents by log10 of the share of held-out tokens that they fire on."""
    figure, axes = _axes()
    axes.stairs(density["counts"], density["edges"], fill=True)
    axes.set(
        xlabel=f"log10 of the share of {density['n']:,} tokens that a latent fires on",
        ylabel="latents",
        title=f"{density['zero']:,} latents fired on none",
    )
    figure.savefig(file)
    return file
