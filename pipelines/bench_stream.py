"""Benchmark of the stream: against pread, zarr-python, zarrs, SAELens' cached loader, streaming.

A store of synthetic bfloat16 rows (d = 768, permuted segments of 131,072 rows; the values do not
matter to any side) lies in the page cache. Every side hands out rows in a random order or in
batches of 4,096, and its rate is rows a second:

  ours      Stream: read, checksum, shuffle; batches in bfloat16 on the CPU
  pread     the same inner chunks in the same order into a preallocated window: one thread, and as
            many as ours; no checksum, no shuffle, nothing handed out
  zarr      the same inner chunks as slices through zarr-python, and through the zarrs pipeline
  SAELens   ActivationsStore over its own cache of the same rows (float32, its default)
  streaming mosaicml's StreamingDataset over an MDS copy of the same rows (float16), shuffled

Cold: the files of a store four times larger, so that the start does not count, are dropped from the
page cache before each turn; ours, one epoch, against reading them from end to end in 1 MiB pieces.
`cold_direct_vs_sequential` is the same with stream.direct=true. Memory: growth of a fresh process
that streams a store ten times larger over its growth with the smaller one.

    python -m pipelines.bench_stream [--quick] [--json FILE]
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.store import Snapshot, open_store
from pipelines.bench import (
    NO_PEAK,
    ROOT,
    Measure,
    Worker,
    can_measure_peak,
    clock,
    command,
    peak_growth,
    private_stdout,
    rate,
    ratios,
    serve,
    turns,
    why_absent,
)
from pipelines.bench_data import make_store
from saetrain.stream import Stream

Say = Callable[[str], None]
HOOK = "resid.2"
EVERYTHING: dict[str, Any] = {"split": "all", "skip_special": False}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work; `rows` of a turn are by side, since they differ a hundredfold."""

    d: int = 768
    segments: int = 3
    cold_segments: int = 12
    segment_rows: int = 131_072
    context: int = 128
    batch_tokens: int = 4096
    window_rows: int = 65_536
    chunk_bytes: int = 1 << 20
    turns: int = 7
    fast_rows: int = 3 << 20
    slow_rows: int = 1 << 17
    threads: int = os.cpu_count() or 1


QUICK = Scale(
    d=32,
    cold_segments=3,
    segment_rows=2048,
    context=32,
    batch_tokens=256,
    window_rows=1024,
    chunk_bytes=1 << 14,
    turns=2,
    fast_rows=8192,
    slow_rows=4096,
)


class Sides:
    """What the workers do; one object in each process."""

    def __init__(self, store: Path, scale: Scale) -> None:
        self.snapshot, self.scale = open_store(store).snapshot(), scale
        torch.set_num_threads(scale.threads)

    def stream(self, direct: bool | None = None) -> Stream:
        """As a user would make it, in the type of the store."""
        return Stream(
            self.snapshot,
            [HOOK],
            batch_tokens=self.scale.batch_tokens,
            window_rows=self.scale.window_rows,
            threads=self.scale.threads,
            direct=direct,
            dtype=torch.bfloat16,
            **EVERYTHING,
        )

    @cached_property
    def _batches(self) -> Iterator[Any]:
        return iter(self.stream())

    def ours(self, rows: int) -> dict[str, Any]:
        """Batches, from where the last turn stopped."""
        done = 0
        with clock() as times:
            while done < rows:
                done += len(next(self._batches).acts[HOOK])
        return times | {"tokens": done}

    # -- the same chunks by other means ----------------------------------------------------------

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """(segment, inner chunk) in the order of the stream's first epoch."""
        stream = self.stream()
        units = (int(u) for w in stream.windows(0) for u in w.units)
        readers = [s.acts(HOOK) for s in self.snapshot.segments]
        places = (stream.eligible.place(u) for u in units)
        return [(s, first // readers[s].chunk_rows) for s, first, _ in places]

    def pread(self, rows: int, threads: int) -> dict[str, Any]:
        """Chunks into a window that is overwritten again and again."""
        readers = [s.acts(HOOK) for s in self.snapshot.segments]
        files = [os.open(r.path, os.O_RDONLY) for r in readers]
        size, chunk_rows = readers[0].chunk_bytes + 4, readers[0].chunk_rows
        n, slots = -(-rows // chunk_rows), max(threads, self.scale.window_rows // chunk_rows)
        window = np.zeros(slots * size, dtype=np.uint8)
        ticket = itertools.count()

        def some() -> None:
            while (i := next(ticket)) < n:
                segment, chunk = self.chunks[i % len(self.chunks)]
                at = i % slots * size
                got = os.preadv(files[segment], [window[at : at + size].data], chunk * size)
                assert got == size

        workers = [threading.Thread(target=some) for _ in range(threads)]
        with clock() as times:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        for file in files:
            os.close(file)
        return times | {"tokens": n * chunk_rows}

    def zarr(self, rows: int, pipeline: str) -> dict[str, Any]:
        """Chunks as slices of the arrays."""
        import zarr

        if pipeline == "zarrs":
            import zarrs  # noqa: F401

            zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        arrays = [zarr.open_array(s.path / "acts" / HOOK, mode="r") for s in self.snapshot.segments]
        step = arrays[0].chunks[0]
        done = 0
        with clock() as times:
            for segment, chunk in itertools.cycle(self.chunks):
                if done >= rows:
                    break
                done += len(np.asarray(arrays[segment][chunk * step : (chunk + 1) * step]))
        return times | {"tokens": done}

    # -- cold ------------------------------------------------------------------------------------

    def cold_stream(self, direct: bool) -> dict[str, Any]:
        """One epoch."""
        stream, done = self.stream(direct), 0
        n = stream.batches_per_epoch
        with clock() as times:
            for batch in itertools.islice(stream, n):
                done += len(batch.acts[HOOK])
        return times | {"tokens": done}

    def cold_read(self) -> dict[str, Any]:
        """All shards from end to end, in pieces of 1 MiB."""
        piece = np.empty(1 << 20, dtype=np.uint8)
        with clock() as times:
            for segment in self.snapshot.segments:
                with Path(segment.acts(HOOK).path).open("rb", buffering=0) as file:
                    while file.readinto(piece.data):
                        pass
        return times | {"tokens": self.snapshot.n_rows}


def serve_sides() -> None:
    """In a worker: answer all of the above."""
    answers = private_stdout()
    store, scale = json.loads(sys.argv[1])
    sides = Sides(Path(store), Scale(**scale))
    names = ("ours", "pread", "zarr", "cold_stream", "cold_read")
    serve(answers, **{name: getattr(sides, name) for name in names})


class Bench:
    """One store, and who reads it."""

    def __init__(self, folder: Path, scale: Scale, say: Say) -> None:
        self.folder, self.scale, self.say = folder, scale, say
        self.store = folder / "store"
        make_store(self.store, scale)

    def worker(self, store: Path | None = None) -> Worker:
        code = "from pipelines.bench_stream import serve_sides; serve_sides()"
        about = json.dumps([str(store or self.store), asdict(self.scale)])
        return Worker(sys.executable, "-c", code, about)

    def against(self, name: str, other: Worker, question: Mapping[str, Any]) -> tuple[float, ...]:
        """Ratios of rows a second, ours first."""
        self.say(f"ours / {name}: rows a second")
        with self.worker() as ours:
            asked = {"do": "ours", "rows": self.scale.fast_rows}
            found = turns(
                {"ours": (ours, asked), name: (other, question)}, self.scale.turns, self.say
            )
        return ratios(found, rate)

    def against_own(self, name: str, **question: Any) -> dict[str, Any]:
        with self.worker() as other:
            return {"ratios": self.against(name, other, question)}

    def against_peer(self, name: str, package: str, script: str, home: str) -> dict[str, Any]:
        """A peer in its own environment, over a copy of the rows in its own format."""
        python = ROOT / home / "bin" / "python"
        absent = why_absent(package, python)
        if absent:
            return {"skipped": absent}
        rows = self.folder / "rows.npy"
        if not rows.exists():
            np.save(rows, self._rows())
        out = self.folder / name
        with Worker(python, Path(__file__).with_name(script)) as other:
            other.ask(do="write", rows=str(rows), out=str(out), context=self.scale.context)
            question = {
                "do": "read",
                "out": str(out),
                "rows": self.scale.slow_rows,
                "batch": self.scale.batch_tokens,
                "threads": self.scale.threads,
            }
            return {"ratios": self.against(name, other, question)}

    def _rows(self) -> NDArray[np.float16]:
        """All rows (n, d) in stored order."""
        snapshot: Snapshot = open_store(self.store).snapshot()
        parts = [s.acts(HOOK).read().astype(np.float16) for s in snapshot.segments]
        return np.concatenate(parts)

    def cold(self) -> dict[str, tuple[float, ...]]:
        """Ours, buffered and direct, over sequential reading, with an empty page cache."""
        self.say("cold: ours / sequential reading, rows a second")
        store = self.folder / "cold"
        make_store(store, Scale(**asdict(self.scale) | {"segments": self.scale.cold_segments}))
        sides: dict[str, dict[str, Any]] = {
            "sequential": {"do": "cold_read"},
            "buffered": {"do": "cold_stream", "direct": False},
            "direct": {"do": "cold_stream", "direct": True},
        }
        found: dict[str, list[float]] = {"buffered": [], "direct": []}
        for turn in range(self.scale.turns):
            rates = {}
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                with self.worker(store) as worker:
                    self._drop(store)
                    answer = worker.ask(**sides[side])
                rates[side] = answer["tokens"] / (answer["finished"] - answer["started"])
            for side, some_ratios in found.items():
                some_ratios.append(rates[side] / rates["sequential"])
            some = "  ".join(f"{k} {v:,.0f}" for k, v in rates.items())
            self.say(f"  {turn + 1}/{self.scale.turns}  {some}")
        return {side: tuple(some_ratios) for side, some_ratios in found.items()}

    def _drop(self, store: Path) -> None:
        for file in store.rglob("c/0/0"):
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def memory(self) -> tuple[float, ...]:
        """Growth with ten times the segments over growth with the smaller store."""
        self.say("memory: a store ten times larger / the smaller one, bytes of growth")
        small = Scale(**asdict(self.scale) | {"d": max(8, self.scale.d // 4), "segments": 1})
        grown: list[list[int]] = []
        for factor in (1, 10):
            store = self.folder / f"times{factor}"
            make_store(store, Scale(**asdict(small) | {"segments": 2 * factor}))
            code = "from pipelines.bench_stream import grow; grow()"
            about = json.dumps([str(store), asdict(small)])
            asked = [sys.executable, "-c", code, about]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            runs = [
                subprocess.run(asked, env=env, stdout=subprocess.PIPE, check=True, text=True)
                for _ in range(min(3, self.scale.turns))
            ]
            grown.append([int(r.stdout) for r in runs])
            self.say(f"  {factor} x: {', '.join(f'{g:,}' for g in grown[-1])}")
        return tuple(b / a for a, b in zip(*grown, strict=True))


def grow() -> None:
    """In a fresh process: print by how many bytes two epochs' worth of windows grew it."""
    store, values = json.loads(sys.argv[1])
    scale = Scale(**values)
    snapshot = open_store(store).snapshot()
    np.zeros(1 << 20).sum()
    with peak_growth() as grown:
        stream = Stream(
            snapshot,
            [HOOK],
            batch_tokens=scale.batch_tokens,
            window_rows=scale.window_rows,
            dtype=torch.bfloat16,
            **EVERYTHING,
        )
        for _ in itertools.islice(stream, 12 * scale.window_rows // scale.batch_tokens):
            pass
    print(grown["bytes"])


def measures(bench: Bench) -> list[Measure]:
    """All rows of the table."""
    scale = bench.scale
    fast: dict[str, Any] = {"better": "higher", "unit": "x rows/s"}
    plain = {"do": "pread", "rows": scale.fast_rows}
    slow = {"do": "zarr", "rows": scale.slow_rows}
    saelens = bench.against_peer("saelens", "sae-lens", "peer_loader_saelens.py", ".peers")
    mosaic = bench.against_peer(
        "mosaicml", "mosaicml-streaming", "peer_loader_mosaicml.py", ".peers-streaming"
    )
    cold = bench.cold()
    return [
        Measure(
            name="vs_pread", goal=0.8, **fast, **bench.against_own("pread", **plain, threads=1)
        ),
        Measure(
            name="vs_pread_same_threads",
            goal=0.8,
            **fast,
            **bench.against_own("pread_threads", **plain, threads=scale.threads),
        ),
        Measure(
            name="vs_zarr_python",
            goal=6.0,
            **fast,
            **bench.against_own("zarr_python", **slow, pipeline="zarr-python"),
        ),
        Measure(
            name="vs_zarrs",
            goal=4.0,
            **fast,
            **bench.against_own("zarrs", **slow, pipeline="zarrs"),
        ),
        Measure(name="vs_saelens", goal=10.0, **fast, **saelens),
        Measure(name="vs_mosaicml", goal=3.0, **fast, **mosaic),
        Measure(name="cold_vs_sequential", goal=0.9, **fast, ratios=cold["buffered"]),
        Measure(name="cold_direct_vs_sequential", goal=0.9, **fast, ratios=cold["direct"]),
        Measure(
            name="memory_10x_store",
            goal=1.1,
            better="lower",
            unit="x bytes of growth",
            **({"ratios": bench.memory()} if can_measure_peak() else {"skipped": NO_PEAK}),
        ),
    ]


def measure(quick: bool, say: Say) -> list[Measure]:
    """Make the store in a scratch folder, and measure there."""
    with tempfile.TemporaryDirectory(prefix="bench_stream.") as scratch:
        return measures(Bench(Path(scratch), QUICK if quick else Scale(), say))


if __name__ == "__main__":
    sys.exit(command(__doc__, measure))
