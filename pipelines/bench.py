"""What all benchmarks share: ratios of sides that run in turn, one table, one JSON file.

No machine is quiet, so nothing here is a bare time. Each side of a comparison is a process; in one
turn both do the same work in slices of half a second, one stopped (SIGSTOP) while the other runs,
so that a slow minute hits both alike. Only the slices count. Each turn gives one ratio; a measure
is the median of its ratios, with the smallest and the largest beside it. A peer that is not
installed is a row that says so.

Bias: what the kernel writes for a stopped process, and what it finds in caches, is not counted.

    python -m pipelines.bench_NAME [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("measure", "value", "goal", "better", "runs", "min", "max", "unit")
SLICE = 0.5  # seconds
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


def ratios(
    found: Mapping[str, Sequence[Mapping[str, Any]]], of: Callable[[Mapping[str, Any]], float]
) -> tuple[float, ...]:
    """`of` the first side's answer over `of` the second's, for each turn of `turns`."""
    first, second = found.values()
    return tuple(of(a) / of(b) for a, b in zip(first, second, strict=True))


def rate(answer: Mapping[str, Any]) -> float:
    """Tokens a second."""
    return float(answer["tokens"] / answer["seconds"])


# -- sides -----------------------------------------------------------------------------------------


class Worker:
    """A process that answers one JSON line with another, see `serve`. Use as a context manager."""

    def __init__(self, *command: str | Path) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            process_group=0,  # with the processes that it starts
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer; RuntimeError if the process died, its own words are on stderr."""
        self.send(question)
        return self.receive()

    def send(self, question: Mapping[str, Any]) -> None:
        """A question, to be answered when the process runs."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {self._process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def has_answer(self, seconds: float) -> bool:
        """Wait up to `seconds` for an answer, or for the end of the process."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def stop(self) -> None:
        """Halt all threads, where they are, and those of processes that it started."""
        self._signal(signal.SIGSTOP)

    def go(self) -> None:
        """Go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.go()
        if kind is not None:
            self._signal(signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def private_stdout() -> TextIO:
    """stdout for answers alone: what libraries print there goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, **functions: Callable[..., Mapping[str, Any]]) -> None:
    """Be a Worker's process: {"do": name, ...} is answered with functions[name](...)."""
    for line in sys.stdin:
        question = json.loads(line)
        answer = functions[question.pop("do")](**question)
        print(json.dumps(answer), file=answers, flush=True)


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """What an answer says of the timed part: started, finished (system-wide), processor seconds."""
    times = {"started": time.monotonic(), "processor": time.process_time()}
    yield times
    times |= {
        "finished": time.monotonic(),
        "processor": time.process_time() - times["processor"],
    }


NO_PEAK = "this system has no /proc to read peak memory from"


def can_measure_peak() -> bool:
    """Whether `peak_growth` works here."""
    return Path("/proc/self/clear_refs").exists()


@contextmanager
def peak_growth() -> Iterator[dict[str, int]]:
    """`bytes`, after the block: by how much its peak exceeds what this process held before.

    What lies free in the process is given back first, or a block that finds it would seem to take
    nothing (`actcache.store.heap` keeps it).
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    before, found = _status("VmRSS"), dict[str, int]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    yield found
    found["bytes"] = _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(f"{field}:")).split()[1]) * 1024


def in_slices(
    sides: Mapping[str, tuple[Worker, Mapping[str, Any]]], slice_s: float = SLICE
) -> dict[str, dict[str, Any]]:
    """Ask every worker its question and let them run by turns until all have answered.

    Each answer gains `seconds`: how long the worker ran between its `started` and `finished`.
    """
    for worker, question in sides.values():
        worker.stop()
        worker.send(question)
    ran: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    answers: dict[str, dict[str, Any]] = {}
    while len(answers) < len(sides):
        for name in [n for n in sides if n not in answers]:
            worker, begin = sides[name][0], time.monotonic()
            worker.go()
            if worker.has_answer(slice_s):
                answers[name] = worker.receive()
            worker.stop()
            ran[name].append((begin, time.monotonic()))
    for name, (worker, _) in sides.items():
        worker.go()
        answers[name]["seconds"] = overlap(
            ran[name], answers[name]["started"], answers[name]["finished"]
        )
    return answers


def overlap(windows: Sequence[tuple[float, float]], started: float, finished: float) -> float:
    """Length of the part of [started, finished] that lies in the windows."""
    return sum(max(0.0, min(b, finished) - max(a, started)) for a, b in windows)


def turns(
    sides: Mapping[str, tuple[Worker, Mapping[str, Any]]],
    repetitions: int,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Answers of one turn to warm up, which is dropped, and of `repetitions` turns that count."""
    in_slices(sides)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(repetitions):
        names = list(sides)[:: 1 if turn % 2 == 0 else -1]  # who begins
        for name, answer in in_slices({n: sides[n] for n in names}).items():
            found[name].append(answer)
        rates = (f"{n} {rate(a[-1]):,.0f}" for n, a in found.items())
        say(f"  {turn + 1}/{repetitions}  {'  '.join(rates)}")
    return found


def peer_python() -> Path:
    """The interpreter of the peers' environment, whether or not it is there."""
    return ROOT / ".peers" / "bin" / "python"


def why_absent(package: str, python: Path | None = None) -> str | None:
    """None if the peers' environment has `package`, else a sentence for the table."""
    python = python or peer_python()
    missing = f"{package} is not installed (make peers)"
    if not python.exists():
        return missing
    code = f"import importlib.metadata as m; m.version({package!r})"
    found = subprocess.run([python, "-c", code], capture_output=True, check=False)
    return None if found.returncode == 0 else missing


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no stopped side behind
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
