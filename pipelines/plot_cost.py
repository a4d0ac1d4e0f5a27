"""What a step costs over width, batch and number of configs: a plot and a table.

TopK in float32, d = 384, k = 32, one thread, planted rows. Three sweeps, each around one point:
latents 1k to 128k, tokens a batch 256 to 16k, configs on one batch 1 to 16. Beside each step stands
its encoder product alone, made in the same pieces, which nothing that encodes can go below.

Times are of the processor, not of the clock, so other processes disturb them little; step and
product run by turns. A value is the median of the repetitions. Bias: shared caches stay shared.

    python -m pipelines.plot_cost [--quick] [--out docs/cost.png]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.bench import machine
from pipelines.bench_step import HOOK, Bench, Ours, Scale
from saetrain.kernels.encode import pieces
from saetrain.kernels.gemm import product
from saetrain.saes.base import HookSpace
from saetrain.saes.sae import Autoencoder


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is varied, around which point."""

    d: int = 384
    k: int = 32
    widths: tuple[int, ...] = tuple(1 << i for i in range(10, 18))
    batches: tuple[int, ...] = tuple(1 << i for i in range(8, 15))
    configs: tuple[int, ...] = (1, 2, 4, 8, 16)
    width: int = 8192  # where another axis is varied
    batch: int = 2048
    small: int = 2048  # latents of each of several configs
    repetitions: int = 7


QUICK = Work(
    d=16, k=4, widths=(64, 128), batches=(32, 64), configs=(1, 2), width=64, batch=64, small=64
)


@dataclass(frozen=True)
class Point:
    """Milliseconds of processor time at one place of an axis."""

    axis: str
    at: int
    tokens: int
    step: float
    product: float


class Ground:
    """Rows, and what a store would know of them."""

    def __init__(self, work: Work, rows: Tensor) -> None:
        self.work, self.rows = work, rows
        self.space = HookSpace(
            name=HOOK,
            d=work.d,
            mean=rows.mean(0),
            mean_norm=float(rows.norm(dim=1).mean()),
            variance=float((rows - rows.mean(0)).square().sum(1).mean()),
        )

    def point(self, axis: str, at: int, n_latents: int, batch: int, configs: int = 1) -> Point:
        """One measurement; the first turn warms up."""
        saes = [Ours(self.space, n_latents, self.work.k) for _ in range(configs)]
        x_BD = self.rows[:batch]
        times: dict[str, list[float]] = {"step": [], "product": []}
        for _ in range(self.work.repetitions + 1):
            times["step"].append(_seconds(lambda: _steps(saes, x_BD)))
            times["product"].append(_seconds(lambda: _products(saes, x_BD)))
        found = {side: 1e3 * statistics.median(t[1:]) for side, t in times.items()}
        return Point(axis, at, batch, **found)


def _steps(saes: Sequence[Ours], x_BD: Tensor) -> None:
    for ours in saes:
        ours.step(x_BD)


def _products(saes: Sequence[Ours], x_BD: Tensor) -> None:
    for ours in saes:
        assert isinstance(ours.sae, Autoencoder)
        W_DF, b_F = ours.sae.W_enc.detach(), ours.sae.b_enc.detach()
        for piece in pieces(len(x_BD), len(b_F), "cpu"):
            product(x_BD[piece], W_DF, b_F)


def _seconds(do: Callable[[], None]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def measure(work: Work, say: Callable[[str], None]) -> list[Point]:
    """All points of the three axes."""
    with tempfile.TemporaryDirectory(prefix="plot_cost.") as scratch:
        bench = Bench(Path(scratch), Scale(), say)
        n = max(*work.batches, work.batch)
        ground = Ground(work, torch.from_numpy(np.load(bench.rows(work.d, n))))
    found = []
    asked = [("latents", w, w, work.batch, 1) for w in work.widths]
    asked += [("batch", b, work.width, b, 1) for b in work.batches]
    asked += [("configs", j, work.small, work.batch, j) for j in work.configs]
    for each in asked:
        found.append(ground.point(*each))
        say(f"  {each[0]} {each[1]:,}: {found[-1].step:.1f} ms, product {found[-1].product:.1f}")
    return found


def table(points: Sequence[Point]) -> str:
    """Markdown."""
    lines = ["| varied | at | step, ms | its product alone, ms | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {p.axis} | {p.at:,} | {p.step:.1f} | {p.product:.1f} | {p.step / p.product:.2f} |"
        for p in points
    ]
    return "\n".join(lines)


def draw(points: Sequence[Point], work: Work, file: Path) -> None:
    """Three panels, logarithmic, each with its product beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    panels: Any = figure.subplots(1, 3)
    titles = {
        "latents": (f"width, {work.batch:,} tokens a batch", "ms a step"),
        "batch": (f"batch, {work.width:,} latents", "µs a token"),
        "configs": (f"configs, {work.small:,} latents each", "ms a step and config"),
    }
    for axes, (axis, (title, unit)) in zip(panels, titles.items(), strict=True):
        here = [p for p in points if p.axis == axis]
        per = [_share(p) for p in here]
        for side, style in (("step", "o-"), ("product", "s--")):
            values = [getattr(p, side) * f for p, f in zip(here, per, strict=True)]
            axes.plot([p.at for p in here], values, style, markersize=4, label=side)
        axes.set_xscale("log", base=2)
        if axis == "latents":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.0f}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks([p.at for p in here], [_short(p.at) for p in here])
        axes.minorticks_off()
        axes.set(title=title, xlabel=axis, ylabel=unit)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"TopK step, float32, d = {work.d}, k = {work.k}, one thread (processor time)")
    figure.savefig(file)


def _share(p: Point) -> float:
    """Milliseconds of all to what the point's panel shows."""
    return {"latents": 1.0, "batch": 1e3 / p.tokens, "configs": 1 / p.at}[p.axis]


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("docs/cost.png"), metavar="FILE")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    work = QUICK if asked.quick else Work()
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    say(machine())
    points = measure(work, say)
    print(table(points))
    draw(points, work, asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
