"""Benchmark of a sweep: eight SAEs from one cache in lockstep, against eight runs one by one.

Tokens of the demo corpus go through a small host (GPT-NeoX of width 256, 4 blocks, random weights:
speed does not depend on them); eight TopK SAEs, two widths by four k, train on one residual stream,
one epoch each. Every side gets the same tokens and ends with eight saved SAEs:

  fused        `actcache run`, then all eight in lockstep (hydra/launcher=fused)
  stacked      the same with fused.stack=true, in the first turn only
  sequential   `actcache run`, then eight runs in one process, as `saetrain -m` does it
  sparsify     eight runs of its trainer, which captures while it trains; its defaults
  commands     `actcache run`, then the command `saetrain` eight times, as a shell's loop does it,
               against one `saetrain -m … hydra/launcher=fused`; the start of Python is included

Every side has the whole machine while it runs: torch has as many threads as there are cores. The
sequential runs and sparsify use them inside each operation; the fused sweep, as it does by default,
lets several SAEs step at once with a share of the threads each. On a machine that others use, too,
threads inside operations wait for each other, so that the fused side looks better than it is: see
the load that is printed first.

Ours include checkpoints, the evaluation on held-out documents and the PCA beside it; reports are
off. sparsify evaluates nothing and saves its SAEs. Loading the host comes before the clock. Ratios
are of seconds for the whole sweep, so above 1 the fused one is faster. Memory is the growth of a
fresh process while it trains: that of the fused sweep over that of the sequential runs, and over
what its plan says.

    python -m pipelines.bench_sweep [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.run import run
from pipelines.bench import (
    ROOT,
    Measure,
    Worker,
    clock,
    command,
    in_slices,
    peak_growth,
    peer_python,
    private_stdout,
    serve,
    why_absent,
)
from pipelines.bench_cache import Bench, token_ids
from pipelines.bench_cache import Scale as CacheScale
from pipelines.bench_data import corpus, make_data, make_host
from saetrain import plan, train
from saetrain.settings import TrainSettings
from saetrain.sweep import Opener, train_together
from saetrain.workers import how_many

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work."""

    d: int = 256
    layers: int = 4
    heads: int = 4
    vocab: int = 4096
    segments: int = 8
    segment_rows: int = 8192
    context: int = 128
    batch_tokens: int = 2048
    layer: int = 2
    held_out_fraction: float = 0.05
    latents: tuple[int, ...] = (2048, 4096)
    ks: tuple[int, ...] = (8, 16, 32, 64)
    turns: int = 3
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    memory_turns: int = 2

    @property
    def configs(self) -> list[tuple[int, int]]:
        return [(f, k) for f in self.latents for k in self.ks]

    @property
    def cache(self) -> CacheScale:
        names = ("d", "layers", "heads", "vocab", "segments", "segment_rows", "context")
        return CacheScale(**{n: getattr(self, n) for n in names}, batch_tokens=2048)


QUICK = Scale(
    d=32,
    layers=2,
    heads=4,
    vocab=400,
    segments=16,
    segment_rows=512,
    context=32,
    batch_tokens=128,
    layer=1,
    held_out_fraction=0.4,
    latents=(32, 64),
    ks=(2, 4, 6, 8),
    turns=1,
    memory_turns=1,
)


class Sweep:
    """Our sides; one object in each process."""

    def __init__(self, folder: Path, host: Path, data: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.bench = Bench(folder, host, data, scale.cache)
        self.hook = f"resid.{scale.layer}"
        torch.set_num_threads(scale.threads)
        self.bench.host.load([])

    def settings(self, folder: Path, *, stack: bool = False) -> list[TrainSettings]:
        """Of the eight runs."""
        common = {
            "store": str(folder / "store"),
            "runs_dir": str(folder / "runs"),
            "hook": self.hook,
            "batch_tokens": self.scale.batch_tokens,
            "epochs": 1,
            "held_out_fraction": self.scale.held_out_fraction,
            "progress": False,
            "report": False,
            "fused": {"stack": stack},
        }
        return [
            TrainSettings.from_mapping({**common, "sae": {"name": "topk", "n_latents": f, "k": k}})
            for f, k in self.scale.configs
        ]

    def sweep(self, how: str) -> dict[str, Any]:
        """Cache and train all; `how` is fused, stacked or sequential."""
        with self._cached() as (folder, times):
            found = self._train(self.settings(folder, stack=how == "stacked"), how)
        fves = [metrics["fve"] for metrics in found]
        return times | {"tokens": found[0]["train_tokens"], "fves": fves}

    def commands(self, how: str) -> dict[str, Any]:
        """Cache, then train by the command: `fused`, or one by one."""
        (widths, ks), name = (self.scale.latents, self.scale.ks), "sae.n_latents={} sae.k={}"
        if how == "fused":
            grid = name.format(*(",".join(map(str, values)) for values in (widths, ks)))
            asked = [f"-m {grid} hydra/launcher=fused"]
        else:
            asked = [name.format(f, k) for f, k in self.scale.configs]
        with self._cached() as (folder, times):
            for words in asked:
                self._command(folder, words.split())
            found = [json.loads(f.read_text())["fve"] for f in folder.glob("runs/*/eval.json")]
        return times | {"fves": found}

    def _command(self, folder: Path, words: list[str]) -> None:
        """One `saetrain`, with as many threads as the other sides. RuntimeError if it fails."""
        common = f"store=store runs_dir=runs hook={self.hook} epochs=1 progress=false report=false "
        common += f"batch_tokens={self.scale.batch_tokens} "
        common += f"held_out_fraction={self.scale.held_out_fraction}"
        command = [sys.executable, "-m", "saetrain", *common.split(), *words]
        threads = {"OMP_NUM_THREADS": str(self.scale.threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=os.environ | threads, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode()[-2000:])

    def _train(self, many: list[TrainSettings], how: str) -> list[dict[str, Any]]:
        if how == "sequential":
            return [train(one).metrics for one in many]
        outcomes = train_together(many)
        found = [o.result.metrics for o in outcomes if o.result is not None]
        if len(found) != len(many):
            raise RuntimeError("a run failed, see above")
        return found

    def grow(self, how: str) -> dict[str, Any]:
        """By how much training all of them grows this process, and what the plan says of it."""
        with self._cached() as (folder, _):
            many = self.settings(folder)
            train(replace(many[0], tokens=self.scale.batch_tokens, epochs=None))  # imports, threads
            with peak_growth() as peak:
                self._train(many, how)
            grown = peak["bytes"]
            opener = Opener()
            jobs = [opener.open(one) for one in many[: None if how == "fused" else 1]]
            pairs = [(j.settings, j.source) for j in jobs]
            each = [plan.memory(*p) for p in pairs]
            workers = how_many(None, len(jobs), jobs[0].device)
            planned = plan.together(pairs, each, workers=workers).total
        return {"grown": grown, "planned": planned}

    @contextmanager
    def _cached(self) -> Any:
        """A folder with a store of all segments, and the clock, which runs."""
        with tempfile.TemporaryDirectory(dir=self.folder) as home:
            cache = self.bench.settings((self.hook,), Path(home, "store"), self.scale.segments)
            with self.bench._loaded(home), clock() as times:
                run(cache)
                yield Path(home), times


def serve_sides() -> None:
    """In a worker."""
    answers = private_stdout()
    folder, host, data, scale = json.loads(sys.argv[1])
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in scale.items()}
    side = Sweep(Path(folder), Path(host), Path(data), Scale(**lists))
    serve(answers, sweep=side.sweep, grow=side.grow, commands=side.commands)


def _worker(folder: Path, scale: Scale) -> Worker:
    code = "from pipelines.bench_sweep import serve_sides; serve_sides()"
    about = json.dumps([str(folder), str(folder / "host"), str(folder / "data"), asdict(scale)])
    return Worker(sys.executable, "-c", code, about)


def measures(scale: Scale, say: Say) -> list[Measure]:
    """All rows of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents = corpus()
        make_host(folder / "host", [text for _, text in documents], scale)
        tokens = scale.segments * scale.segment_rows
        make_data(folder / "data", documents, folder / "host", tokens)
        absent = why_absent("eai-sparsify")
        speed = _speed(folder, scale, None if absent else _question(folder, scale), say)
        memory = _memory(folder, scale, say)
    peer = speed.get("sparsify")
    return [
        Measure(
            name="vs_sparsify_on_the_fly",
            goal=6.0,
            better="higher",
            unit="x faster",
            ratios=tuple(peer) if peer else (),
            skipped=None if peer else absent,
        ),
        _faster("vs_sequential", 1.5, speed["sequential"]),
        _faster("vs_sequential_commands", 1.5, speed["commands"]),
        _faster("stacked_vs_fused", 1.0, [1 / r for r in speed["stacked"]]),
        Measure(
            name="peak_memory",
            goal=2.0,
            better="lower",
            unit="of sequential runs",
            ratios=tuple(a / b for a, b in zip(memory["fused"], memory["sequential"], strict=True)),
        ),
        Measure(
            name="peak_memory_vs_plan",
            goal=1.5,
            better="lower",
            unit="of the plan",
            ratios=tuple(memory["planned"]),
        ),
    ]


def _faster(name: str, goal: float, found: list[float]) -> Measure:
    return Measure(name=name, goal=goal, better="higher", unit="x faster", ratios=tuple(found))


def _question(folder: Path, scale: Scale) -> dict[str, Any]:
    """sparsify's sweep over the same token ids."""
    side = Sweep(folder, folder / "host", folder / "data", scale)
    with side._cached() as (home, _):
        from actcache.store import open_store

        np.save(folder / "ids.npy", token_ids(open_store(home / "store")))
    return {
        "do": "sweep",
        "host": str(folder / "host"),
        "ids": str(folder / "ids.npy"),
        "context": scale.context,
        "batch_tokens": scale.batch_tokens,
        "layer": scale.layer,
        "configs": scale.configs,
        "threads": scale.threads,
    }


def _speed(
    folder: Path, scale: Scale, peer: dict[str, Any] | None, say: Say
) -> dict[str, list[float]]:
    """Seconds of every side over those of the fused sweep, turn by turn."""
    asked = _questions() | ({} if peer is None else {"sparsify": peer})
    found: dict[str, list[float]] = {way: [] for way in asked}
    with ExitStack() as stack:
        workers = {way: _worker(folder, scale) for way in asked if way != "sparsify"}
        if peer is not None:
            script = Path(__file__).with_name("peer_sweep.py")
            workers["sparsify"] = Worker(peer_python(), script)
        for worker in workers.values():
            stack.enter_context(worker)
        for turn in range(scale.turns):
            now = [way for way in asked if turn == 0 or way != "stacked"]
            answers = in_slices({way: (workers[way], asked[way]) for way in now})
            for way in ("sequential", "fused command", "commands"):
                _check_equal(answers["fused"]["fves"], answers[way]["fves"])
            for way, answer in answers.items():
                base = answers["fused command" if way == "commands" else "fused"]
                found[way].append(answer["seconds"] / base["seconds"])
            each = (f"{way} {a['seconds']:.1f} s" for way, a in answers.items())
            say(f"  {turn + 1}/{scale.turns}  {'  '.join(each)}")
    return found


def _questions() -> dict[str, dict[str, Any]]:
    """To our sides."""
    asked = {way: {"do": "sweep", "how": way} for way in ("fused", "sequential", "stacked")}
    asked["fused command"] = {"do": "commands", "how": "fused"}
    return asked | {"commands": {"do": "commands", "how": "sequential"}}


def _check_equal(fused: list[float], sequential: list[float]) -> None:
    """RuntimeError unless both sides trained the same SAEs; evaluation may round differently."""
    pairs = zip(sorted(fused), sorted(sequential), strict=True)
    if any(abs(a - b) > 1e-6 for a, b in pairs):
        raise RuntimeError(f"nothing to compare: FVE of {fused} fused, of {sequential} one by one")


def _memory(folder: Path, scale: Scale, say: Say) -> dict[str, list[float]]:
    """Bytes of growth in fresh processes, and of the fused one over its plan."""
    found: dict[str, list[float]] = {"fused": [], "sequential": [], "planned": []}
    for turn in range(scale.memory_turns):
        grown = {}
        for way in ("fused", "sequential"):
            with _worker(folder, scale) as worker:
                grown[way] = worker.ask(do="grow", how=way)
            found[way].append(grown[way]["grown"])
        found["planned"].append(grown["fused"]["grown"] / grown["fused"]["planned"])
        each = (f"{w} grew {g['grown']:,} planned {g['planned']:,}" for w, g in grown.items())
        say(f"  {turn + 1}/{scale.memory_turns}  {'  '.join(each)}")
    return found


def main() -> int:
    """See the module."""
    return command(__doc__, lambda quick, say: measures(QUICK if quick else Scale(), say))


if __name__ == "__main__":
    sys.exit(main())
