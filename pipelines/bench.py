"""What all benchmarks share: ratios of sides that run in turn, one table, one JSON file.

No machine is quiet, so nothing here is a bare time. The sides of a comparison run in turn, in the
same process or in a pair of processes that wait for each other, and swap places every time (A B,
B A, ...), so that a slow minute hits both. Each turn gives one ratio; a measure is the median of
its ratios, with the smallest and the largest beside it. A peer that is not installed is a row that
says so.

    python -m pipelines.bench_NAME [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("measure", "value", "goal", "better", "runs", "min", "max", "unit")
_SIGN = {"higher": "≥", "lower": "≤"}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One row of a table: ratios of one comparison, or why there are none."""

    name: str
    goal: float
    better: Literal["higher", "lower"]
    unit: str
    ratios: tuple[float, ...] = ()
    skipped: str | None = None

    def __post_init__(self) -> None:
        if bool(self.ratios) == bool(self.skipped):
            raise ValueError(f"{self.name}: give ratios, or say why the measure is skipped")

    @property
    def value(self) -> float | None:
        """The median; None if the measure was skipped."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None if the measure was skipped."""
        if self.value is None:
            return None
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal

    def to_json(self) -> dict[str, Any]:
        """The fields of the JSON file; a skipped measure has no numbers and a reason."""
        row = {
            "value": self.value,
            "goal": self.goal,
            "better": self.better,
            "runs": len(self.ratios),
            "min": min(self.ratios, default=None),
            "max": max(self.ratios, default=None),
            "unit": self.unit,
        }
        return row if self.skipped is None else row | {"skipped": self.skipped}

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        goal = f"{_SIGN[self.better]} {self.goal:g}"
        if self.value is None:
            return (
                self.name,
                f"skipped: {self.skipped}",
                goal,
                self.better,
                "0",
                "",
                "",
                self.unit,
            )
        value = f"{self.value:.3f}" + ("" if self.met else " (missed)")
        some = (f"{min(self.ratios):.3f}", f"{max(self.ratios):.3f}")
        return (self.name, value, goal, self.better, str(len(self.ratios)), *some, self.unit)


def table(measures: Sequence[Measure]) -> str:
    """The measures as aligned columns."""
    rows = [COLUMNS, *(m.cells() for m in measures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def in_turn(
    sides: Mapping[str, Callable[[], float]], repetitions: int, note: Callable[[str], None] = print
) -> dict[str, list[float]]:
    """What each side returns, `repetitions` times; the order is reversed after every turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repetitions):
        names = list(sides)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            found[name].append(sides[name]())
        note(
            f"  {turn + 1}/{repetitions}  "
            + "  ".join(f"{n} {v[-1]:,.0f}" for n, v in found.items())
        )
    return found


def ratios(of: Sequence[float], to: Sequence[float]) -> tuple[float, ...]:
    """One ratio for each turn."""
    return tuple(a / b for a, b in zip(of, to, strict=True))


# -- peers -----------------------------------------------------------------------------------------


def peer_python() -> Path:
    """The interpreter of the peers' environment, whether or not it is there."""
    return ROOT / ".peers" / "bin" / "python"


def why_absent(package: str, python: Path | None = None) -> str | None:
    """None if the peers' environment has `package`, else a sentence for the table."""
    python = python or peer_python()
    if not python.exists():
        return f"{package} is not installed (make peers)"
    code = f"import importlib.metadata as m; m.version({package!r})"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return None if found.returncode == 0 else f"{package} is not installed (make peers)"


class Peer:
    """A script in the peers' environment that answers one JSON line with another.

    The script imports and warms up once; between questions it waits, and uses no processor.
    """

    def __init__(self, script: Path, python: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [python or peer_python(), script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The script's answer; RuntimeError if it died, its own words are on stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self._process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# -- the command -----------------------------------------------------------------------------------


def command(
    doc: str | None,
    measure: Callable[[bool, Callable[[str], None]], Sequence[Measure]],
    argv: Sequence[str] | None = None,
) -> int:
    """`python -m pipelines.bench_NAME`: measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures to FILE")
    asked = parser.parse_args(argv)
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    say(machine())
    measures = measure(asked.quick, say)
    print(table(measures))
    if asked.quick:
        print("--quick: the figures mean nothing")
    if asked.json is not None:
        text = json.dumps({m.name: m.to_json() for m in measures}, indent=2)
        asked.json.write_text(text + "\n")
    return 0


def machine() -> str:
    """What the figures were taken on, without its name."""
    import torch

    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{os.cpu_count()} cores {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, python {platform.python_version()}, load {load}"
    )
